"""BN207: statistics that were reset, in a layer that was trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import batches_tracked, is_initial
from batchnorm.diagnostics.subject import Subject


class Reset(Check):
    code = "BN207"
    name = "reset"
    severity = "error"
    symptom = "A trained network is at chance in evaluation."
    why = (
        "reset_running_stats() makes them 0 and 1 and the count 0, for a new measurement over data; without it "
        "evaluation normalises by 0 and 1."
    )
    source = "pytorch #49082 (update_bn); fvcore #97"

    def find(self, subject: Subject) -> Iterator[Finding]:
        layers = subject.learning
        elsewhere = any(not is_initial(layer) for layer in layers.values())
        for path, layer in subject.evaluated.items() if any(map(is_initial, layers.values())) else ():
            if is_initial(layer) and batches_tracked(layer) == 0 and (elsewhere or self._is_trained(layer)):
                yield self.finding(
                    path,
                    "its running statistics are 0 and 1 after no batches, while the network has been trained",
                    "bn.population(model, batches)",
                )

    @staticmethod
    def _is_trained(layer: Any) -> bool:
        if layer.weight is None:
            return False
        return bool(layer.weight.std(correction=0) > 0) and bool(layer.bias.std(correction=0) > 0)

    def fix(self, subject: Subject, finding: Finding) -> str:
        return subject.measure_again(finding.layer)

    def plant(self, case: Case) -> None:
        case.layer.reset_running_stats()
