"""BN504: synchronized layers that not every batch reaches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import is_synchronized
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.convert_sync import convert_sync


class SyncSkipped(Check):
    code = "BN504"
    name = "sync-skipped"
    severity = "error"
    symptom = "Training over several processes stands still, without an error."
    why = (
        "A synchronized layer waits for the same layer on every process. In a branch that depends on the data some "
        "process does not come."
    )
    source = "pytorch #44957"
    needs = ("measured",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, calls in subject.measured.calls.items():
            if is_synchronized(subject.learning[path]) and len(set(calls)) > 1:
                yield self.finding(
                    path,
                    f"is synchronized, and is called {min(calls)} to {max(calls)} times with a batch, by what is in it",
                    "plain layers in that branch, or a call with an empty batch",
                    fewest=min(calls),
                    most=max(calls),
                )

    def plant(self, case: Case) -> None:
        """By a branch that one batch does not take."""
        layer, _ = convert_sync(case.layer)
        marked = float(case.batches[1].flatten()[0])
        branch = Branch(layer)

        def look(_: Any, given: Any) -> None:
            branch.skips = float(given[0].flatten()[0]) == marked

        case.model.register_forward_pre_hook(look)
        case.replace(case.path, branch)
        case.path = f"{case.path}.norm"


class Branch(nn.Module):
    """A layer that some batches leave out."""

    skips = False

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return x if self.skips else self.norm(x)
