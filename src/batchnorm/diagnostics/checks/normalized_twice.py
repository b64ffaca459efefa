"""BN106: a layer that normalises what another has normalised."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.estimate import population


class NormalizedTwice(Check):
    code = "BN106"
    name = "normalized-twice"
    severity = "warning"
    symptom = "A layer whose running mean and variance are the β and γ² of the one before it."
    why = (
        "Nothing but layout changes is between the two: the second undoes the γ and β of the first, which get no "
        "gradient then."
    )
    source = "Ioffe & Szegedy 2015, algorithm 1: the output is invariant to an affine map of the input"
    needs = ("structure",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, before in subject.firsts():
            if before.norms and before.directly and not before.linear and not before.nonlinear:
                names = ", ".join(dict.fromkeys(before.norms))
                yield self.finding(
                    path,
                    f"normalises what {names} has normalised, with nothing in between",
                    "remove one of the two; bn.fold folds the first into the second for inference",
                    # the identity branch of a block that is re-parametrised reads what others read too
                    severity="warning" if before.alone else "info",
                    before=names,
                )

    def plant(self, case: Case) -> None:
        case.replace(case.before, nn.Sequential(case.convolution, nn.BatchNorm2d(case.layer.num_features)))
        population(case.model, case.batches)
        case.optimizer.add_param_group({"params": [*case.convolution[1].parameters()], "weight_decay": 0.0})
