"""BN603: batch normalization under federated averaging."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.freeze import freeze


class Federated(Check):
    code = "BN603"
    name = "federated"
    severity = "warning"
    symptom = "The averaged model is worse in evaluation than those of its clients."
    why = (
        "Clients whose data differ have other statistics. Averages of parameters leave the buffers out, or average "
        "variances as if the means were equal."
    )
    source = "PFLlib #260; FLamby #260; FedScale #57; NVFlare #1718; Li et al. 2021 (FedBN)"

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path in subject.learning if subject.use == "federated" else ():
            yield self.finding(
                path,
                "has running statistics, which an average of parameters does not merge",
                "bn.merge_states([(state, count), ...]), or bn.split_state(model) to keep them local",
            )

    def plant(self, case: Case) -> None:
        case.options["use"] = "federated"
        for path, module in [*case.model.named_modules()]:
            if isinstance(module, nn.BatchNorm2d) and path != case.path:
                freeze(module)
