"""BN602: batch normalization under differential privacy."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.freeze import freeze

_LIBRARY = "opacus"


class Private(Check):
    code = "BN602"
    name = "private"
    severity = "error"
    symptom = "Opacus refuses the model, or a privacy budget is stated that does not hold."
    why = (
        "A guarantee for each example needs a gradient of each example alone. A batch's statistics depend on all of "
        "them, and running statistics are released without noise."
    )
    source = "opacus #319, #340, #567, #828"

    def find(self, subject: Subject) -> Iterator[Finding]:
        optimizer = type(subject.optimizer).__mro__ if subject.optimizer is not None else ()
        private = (
            subject.use == "private"
            or any(type(each).__module__.startswith(_LIBRARY) for each in subject.model.modules())
            or any(each.__module__.startswith(_LIBRARY) for each in optimizer)
            or any(hasattr(each, "grad_sample") for each in subject.model.parameters())
        )
        for path in subject.learning if private else ():
            yield self.finding(
                path,
                "mixes the examples of a batch, and each must be private",
                f'bn.freeze(model.get_submodule("{path}")), or torch.nn.GroupNorm in its place',
            )

    def plant(self, case: Case) -> None:
        """All others are frozen; the model is for private training."""
        case.options["use"] = "private"
        for path, module in [*case.model.named_modules()]:
            if isinstance(module, nn.BatchNorm2d) and path != case.path:
                freeze(module)
