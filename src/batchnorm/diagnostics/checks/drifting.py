"""BN205: frozen parameters over statistics that move."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class Drifting(Check):
    code = "BN205"
    name = "drifting"
    severity = "warning"
    symptom = "A backbone that is frozen gets worse while the head is trained."
    why = (
        "requires_grad=False freezes weight and bias. In training mode the layer normalises by the batch all the same, "
        "and its running statistics go on to those of the new data."
    )
    source = "pytorch #86590, #10856; chemprop PR 952"

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, layer in subject.learning.items():
            affine = [*layer.parameters(recurse=False)]
            if affine and layer.training and not any(each.requires_grad for each in affine):
                yield self.finding(
                    path,
                    "its weight and bias are frozen, its running statistics are not",
                    f'bn.freeze(model.get_submodule("{path}")), or of the whole frozen part',
                )

    def plant(self, case: Case) -> None:
        case.layer.requires_grad_(False)
