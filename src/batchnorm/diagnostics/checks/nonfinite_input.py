"""BN408: inf or nan in what comes to a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class NonfiniteInput(Check):
    code = "BN408"
    name = "nonfinite-input"
    severity = "error"
    symptom = "Evaluation gives nan from some step on, although the loss is finite again."
    why = "One such value makes the batch's mean and variance nan, and torch's running statistics keep them for good."
    source = "pytorch #88474, #90342, #96798, #115500"
    needs = ("measured",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        measured = subject.measured
        for path in measured.order:
            numbers = measured.spoiled[path]
            if numbers:
                yield self.finding(
                    path,
                    f"batch {numbers[0]} brings it inf or nan",
                    "mend what makes it; bn.upgrade(model): ours leave such a batch out of their statistics",
                    batch=numbers[0],
                    batches=len(numbers),
                )
                return  # what follows has it from here

    def plant(self, case: Case) -> None:
        """In what a branch before the layer makes of one batch."""
        marked = float(case.batches[1].flatten()[0])

        def spoil(model: Any, given: Any) -> None:
            case.model.spoiled = float(given[0].flatten()[0]) == marked

        def hook(*arguments: Any) -> Any:
            return arguments[2] * float("inf") if getattr(case.model, "spoiled", False) else None

        case.model.register_forward_pre_hook(spoil)
        case.convolution.register_forward_hook(hook)
