"""BN701: the time that `bn.upgrade` would save."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.runs import Runs
from batchnorm.diagnostics.subject import Missing, Subject
from batchnorm.graph.modules import is_ours
from batchnorm.graph.observation import tensors_of
from batchnorm.passes.upgrade import upgrade

_ROUNDS = 5


class UpgradeSpeed(Check):
    code = "BN701"
    name = "upgrade-speed"
    severity = "info"
    symptom = "A training step that waits for memory."
    why = (
        "On a CPU our layers read and write each activation about once, with the activation and the sum behind them in "
        "the same pass. Measured: forward and backward passes of a copy of the model and of an upgraded one, in turns."
    )
    source = "docs/speed.md"
    needs = ("measured",)
    on_request = True

    def find(self, subject: Subject) -> Iterator[Finding]:
        plain = [layer for layer in subject.layers.values() if not is_ours(layer)]
        if not plain:
            return
        now, then = _measured(subject.runs)
        if then < 0.98 * now:
            yield self.finding(
                "",
                f"a forward and backward pass takes {now * 1e3:.3g} ms, upgraded {then * 1e3:.3g} ms",
                "model, report = bn.upgrade(model)",
                milliseconds=now * 1e3,
                upgraded=then * 1e3,
            )

    def plant(self, case: Case) -> None:
        """No bug: torch's layers."""
        case.path = ""


def _measured(runs: Runs) -> tuple[float, float]:
    """Seconds of a forward and backward pass, of copies: as it is, and upgraded; medians. Raises: Missing."""
    try:
        models = [deepcopy(runs.model).train(), upgrade(deepcopy(runs.model).train())[0]]
        times: list[list[float]] = [[], []]
        for number in range(_ROUNDS + 1):
            for model, taken in zip(models, times, strict=True):
                begun = time.perf_counter()
                _pass(runs, model)
                if number:  # the first one warms up
                    taken.append(time.perf_counter() - begun)
    except Exception as why:
        raise Missing(
            f"copies of the model could not be timed: {type(why).__name__}: {why}".splitlines()[0]
        ) from why
    return statistics.median(times[0]), statistics.median(times[1])


def _pass(runs: Runs, model: nn.Module) -> None:
    made = tensors_of(runs.forward(model, runs.batches[0]))
    losses = [each.float().mean() for each in made if each.requires_grad and each.is_floating_point()]
    torch.stack([loss.cpu() for loss in losses]).sum().backward()
    if losses and losses[0].is_cuda:
        torch.cuda.synchronize()
