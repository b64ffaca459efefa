"""BN306: statistics that move while nothing is learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from batchnorm.diagnostics.check import Case, Check, plural
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class MovedWithoutGradient(Check):
    code = "BN306"
    name = "moved-without-gradient"
    severity = "warning"
    symptom = "Validation changes the model: its score depends on what was validated before."
    why = (
        "A pass under torch.no_grad() in training mode normalises by the batch and moves the running statistics: a "
        "validation without model.eval(), the teacher or target network of a method, the second step of SAM."
    )
    source = "sam #30; VAT-pytorch #8; libreyolo #671"
    needs = ("steps",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        assert subject.steps is not None
        layers = {path: each for path, each in subject.steps.layers.items() if path in subject.learning}
        # what runs again with gradients, in the backward pass, is checkpointing
        passes = {path: each.without_gradient - each.recomputed for path, each in layers.items()}
        moved = [path for path, number in passes.items() if number > 0]
        fix = "model.eval() before it, or with bn.paused(model):"
        if moved and len(moved) == len(layers):
            yield self.finding(
                "",
                f"{plural(max(passes[path] for path in moved), 'pass')} without gradients in training "
                "mode moved the running statistics of all layers",
                fix,
                layers=len(moved),
            )
            return
        for path in moved:
            yield self.finding(
                path,
                f"its running statistics moved in {plural(passes[path], 'pass')} without gradients",
                fix,
                passes=passes[path],
            )

    def plant(self, case: Case) -> None:
        case.path = ""
        case.options["between"] = lambda model, batch: _without_gradient(model, batch)


def _without_gradient(model: Any, batch: Any) -> None:
    with torch.no_grad():
        model(batch)
