"""BN104: local response normalization beside batch normalization."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.estimate import population


class ResponseNormalization(Check):
    code = "BN104"
    name = "response-normalization"
    severity = "warning"
    symptom = "A slower step, for nothing."
    why = "With batch normalization it is not needed; the paper removes it."
    source = "Ioffe & Szegedy 2015, section 4.2.1; Krizhevsky et al. 2012"
    needs = ("structure",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path in subject.structure.responses if subject.learning else []:
            yield self.finding(
                path,
                "normalises local responses, in a network with batch normalization",
                "remove it (torch.nn.Identity() in a module's place), and train",
            )

    def plant(self, case: Case) -> None:
        case.replace(case.before, nn.Sequential(case.convolution, nn.LocalResponseNorm(3)))
        case.path = f"{case.before}.1"
        population(case.model, case.batches)
