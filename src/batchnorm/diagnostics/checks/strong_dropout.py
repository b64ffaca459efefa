"""BN103: dropout as strong as without batch normalization."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class StrongDropout(Check):
    code = "BN103"
    name = "strong-dropout"
    severity = "info"
    symptom = "Training is slower than it need be, and the network fits less."
    why = (
        "Batch normalization regularises too: a training example is seen together with others. The paper's networks "
        "are better without dropout, or with less."
    )
    source = "Ioffe & Szegedy 2015, sections 3.4 and 4.2.1"
    needs = ("structure",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        if subject.learning:
            for each in subject.structure.dropouts:
                if each.p >= 0.4:
                    yield self.finding(
                        each.path,
                        f"drops {each.p:.0%} in a network with batch normalization",
                        "try p=0.1, or 0",
                        p=each.p,
                    )

    def plant(self, case: Case) -> None:
        """On what the model returns, behind every layer."""
        case.model.register_module("planted", nn.Dropout(0.5))
        case.model.register_forward_hook(lambda model, _, made: model.planted(made))
        case.path = "planted"
