"""BN105: normalization of what a nonlinearity makes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.estimate import population


class AfterNonlinearity(Check):
    code = "BN105"
    name = "after-nonlinearity"
    severity = "info"
    symptom = "None by itself; some networks are made so."
    why = (
        "The paper normalises Wu + b, whose distribution is closer to a Gaussian and symmetric, not g(Wu + b). Such a "
        "layer cannot be folded into the operation before it, only into the one behind."
    )
    source = "Ioffe & Szegedy 2015, section 3.2"
    needs = ("structure",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, before in subject.firsts():
            if before.nonlinear and not before.linear and not before.norms:
                name = before.nonlinear[0]
                yield self.finding(
                    path,
                    f"normalises what {name} makes, not what comes to it",
                    "put it in front of the nonlinearity, unless the network is made so",
                    nonlinearity=name,
                )

    def plant(self, case: Case) -> None:
        case.replace(case.before, nn.Sequential(case.convolution, nn.Sigmoid()))
        population(case.model, case.batches)
