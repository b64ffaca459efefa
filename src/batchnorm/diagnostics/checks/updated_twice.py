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
    symptom = "num_batches_tracked is a multiple of the steps; the average forgets faster than its momentum says."
    why = (
        "Activation checkpointing runs the forward again in the backward pass, and torch's layers then update again; "
        "so do further forward passes in a step: a penalty, a second view, a validation in training mode."
    )
    source = "pytorch #96136, #62471; fairscale #1035; insightface #2053"
    needs = ("backward",)
    yields_to = ("BN108",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        seen = subject.updates
        for path, counted in seen.counted.items():
            calls = seen.forward[path]
            if counted > calls > 0:
                yield self.finding(
                    path,
                    f"was called {calls}× in a forward pass and counted {counted} batches: it runs again in the "
                    "backward pass (checkpointing)",
                    "bn.upgrade(model): ours tell a recomputation; or checkpoint without this layer",
                    calls=calls,
                    counted=counted,
                )

    def plant(self, case: Case) -> None:
        """By checkpointing the layer, as a user would its block."""
        layer = case.layer
        inner = layer.forward
        layer.forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
