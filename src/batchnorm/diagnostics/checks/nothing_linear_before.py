"""BN107: a layer that gets the model's input, or what no learned operation made."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.estimate import population


class NothingLinearBefore(Check):
    code = "BN107"
    name = "nothing-linear-before"
    severity = "info"
    symptom = "The model depends on the scale of the data of its last batches."
    why = (
        "On the input itself it standardises the data: by the batch in training, by a moving average afterwards. "
        "Numbers measured once, subtracted and divided by, are the same without noise."
    )
    source = "Ioffe & Szegedy 2015, section 3.2: BN transforms Wu + b"
    needs = ("structure",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, before in subject.firsts():
            if before.given and not (before.linear or before.nonlinear or before.norms):
                yield self.finding(
                    path,
                    "normalises an input of the model: no learned linear operation is before it",
                    "normalise the data by their own mean and deviation",
                )

    def plant(self, case: Case) -> None:
        """On the images, with the layer that stood there moved behind it."""
        case.path = "planted"
        case.model.register_module("planted", nn.BatchNorm2d(case.batches[0].shape[1]))
        case.model.register_forward_pre_hook(lambda model, given: (model.planted(given[0]), *given[1:]))
        case.optimizer.add_param_group({"params": [*case.layer.parameters()], "weight_decay": 0.0})
        population(case.model, case.batches)
