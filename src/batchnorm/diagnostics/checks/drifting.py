"""BN205: frozen parameters over statistics that move."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Check
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
        if not any(parameter.requires_grad for parameter in subject.model.parameters()):
            return
        for path, layer in subject.tracking.items():
            affine = [each for each in (layer.weight, layer.bias) if each is not None]
            frozen = bool(affine) and not any(each.requires_grad for each in affine)
            if frozen and layer.training and not subject.is_frozen(layer):
                yield self.finding(
                    path,
                    "its weight and bias are frozen, its running statistics are not",
                    "bn.freeze(model, only=...)",
                )

    def plant(self, model: nn.Module, path: str) -> None:
        model.get_submodule(path).requires_grad_(False)
