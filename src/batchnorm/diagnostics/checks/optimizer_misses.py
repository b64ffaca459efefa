"""BN301: parameters that the optimizer does not have."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class OptimizerMisses(Check):
    code = "BN301"
    name = "optimizer-misses"
    severity = "error"
    symptom = "γ and β of some layers stay 1 and 0."
    why = (
        "Groups that are made by a parameter's name or shape leave out what fits none, and a layer that is put in "
        "after the optimizer was made is in no group."
    )
    source = "docs/parameters.md"

    def find(self, subject: Subject) -> Iterator[Finding]:
        if subject.optimizer is None:
            return
        trained = {id(each) for group in subject.optimizer.param_groups for each in group["params"]}
        for path, layer in subject.layers.items():
            named = {"weight": layer.weight, "bias": layer.bias}
            missing = [
                name
                for name, each in named.items()
                if each is not None and each.requires_grad and id(each) not in trained
            ]
            if missing:
                yield self.finding(
                    path,
                    f"the optimizer does not have its {' and '.join(missing)}",
                    "optimizer = SGD(bn.param_groups(model, weight_decay), lr=...)",
                    parameters=len(missing),
                )

    def plant(self, model: nn.Module, path: str) -> None:
        """By a new layer, which an optimizer that was made before does not have."""
        layer = model.get_submodule(path)
        layer.weight = nn.Parameter(layer.weight.detach().clone())  # type: ignore[operator]
