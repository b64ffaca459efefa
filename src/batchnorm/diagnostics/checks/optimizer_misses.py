"""BN301: parameters that the optimizer does not have."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Case, Check
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
    source = "yolov3 #469; docs/parameters.md"
    needs = ("optimizer",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path in subject.layers:
            missing = self._missing(subject, path)
            if missing:
                yield self.finding(
                    path,
                    f"the optimizer does not have its {' and '.join(missing)}",
                    "optimizer = SGD(bn.param_groups(model, weight_decay), lr=...)",
                    parameters=len(missing),
                )

    @staticmethod
    def _missing(subject: Subject, path: str) -> dict[str, nn.Parameter]:
        assert subject.optimizer is not None
        trained = {id(each) for group in subject.optimizer.param_groups for each in group["params"]}
        own = subject.layers[path].named_parameters(recurse=False)
        return {name: each for name, each in own if each.requires_grad and id(each) not in trained}

    def fix(self, subject: Subject, finding: Finding) -> str:
        assert subject.optimizer is not None
        missing = self._missing(subject, finding.layer)
        subject.optimizer.add_param_group({"params": [*missing.values()], "weight_decay": 0.0})
        return f"{' and '.join(missing)} → a group of the optimizer, without weight decay"

    def plant(self, case: Case) -> None:
        """By a new parameter, which an optimizer that was made before does not have."""
        case.layer.weight = nn.Parameter(case.layer.weight.detach().clone())
