"""BN102: dropout whose noise the statistics contain."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.structure import Dropped
from batchnorm.diagnostics.subject import Subject


class DropoutBefore(Check):
    code = "BN102"
    name = "dropout-before"
    severity = "warning"
    symptom = (
        "Good in training, worse in evaluation, and better again without dropout or with fresh statistics."
    )
    why = (
        "Dropout makes the variance of what follows larger in training than in evaluation, by about 1 / (1 - p). The "
        "running variance is that of training, so in evaluation the layer divides by too much (variance shift)."
    )
    source = "Li et al. 2019, Understanding the disharmony between dropout and batch normalization by variance shift"
    needs = ("structure",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        found = subject.structure
        for path, layer in subject.learning.items():
            dropped: dict[str, tuple[Dropped, bool]] = {}
            for call in found.calls_of(layer):
                before = found.before(call)
                dropped |= {each.path: (each, False) for each in before.dropped_before.values()}
                dropped |= {each.path: (each, True) for each in before.dropped.values()}
            for each, directly in dropped.values():
                yield self.finding(
                    path,
                    f"gets what {each.path or 'the model'} drops (p={each.p:g}){'' if directly else ', convolved'}: "
                    "its running variance is larger than evaluation's",
                    "drop after the last batch normalization, or bn.population(model, batches)",
                    severity="warning" if directly else "info",  # as published networks do
                    p=each.p,
                    dropout=each.path,
                )

    def plant(self, case: Case) -> None:
        """In front of the layer, in a module that was there."""
        case.replace(case.before, nn.Sequential(case.convolution, nn.Dropout(0.5)))
