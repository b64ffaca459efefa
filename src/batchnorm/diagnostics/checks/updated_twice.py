"""BN303: statistics that move twice a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class UpdatedTwice(Check):
    code = "BN303"
    name = "updated-twice"
    severity = "warning"
    symptom = (
        "num_batches_tracked is a multiple of the steps; the average forgets faster than its momentum says."
    )
    why = (
        "Activation checkpointing runs the forward again in the backward pass, and torch's layers then update again; "
        "so do further forward passes in a step: a penalty, a second view, a validation in training mode."
    )
    source = "pytorch #96136, #62471; fairscale #1035; insightface #2053"
    yields_to = ("BN108",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, (calls, counted) in self._counted(subject).items():
            if counted > calls > 0:
                yield self.finding(
                    path,
                    f"was called {calls}× in forward passes and counted {counted} batches: it runs again in the "
                    "backward pass (checkpointing)",
                    "bn.upgrade(model): ours tell a recomputation; or checkpoint without this layer",
                    calls=calls,
                    counted=counted,
                )

    @staticmethod
    def _counted(subject: Subject) -> dict[str, tuple[int, int]]:
        """By path, calls in forward passes, and batches that were counted. Raises: Missing."""
        if subject.steps is not None:
            layers = subject.steps.layers.items()
            return {path: (each.training + each.without_gradient, each.counted) for path, each in layers}
        seen = subject.updates
        return {path: (seen.forward[path], counted) for path, counted in seen.counted.items()}

    def plant(self, case: Case) -> None:
        """By checkpointing the layer, as a user would its block."""
        layer = case.layer
        inner = layer.forward
        layer.forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
