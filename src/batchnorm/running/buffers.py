"""Running statistics: how fast they follow, how wide they stay, and the named sets beside a layer's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

STATISTICS = ("running_mean", "running_var")


def rate_of_next(momentum: float | None, batches: Tensor | None, debiased: bool) -> float | Tensor:
    """The weight of the next batch after `batches` others.

    momentum: that weight itself, the exponential average; None: 1/n for the nth batch, the cumulative one.
    debiased: momentum / (1 - (1 - momentum)ⁿ) for the nth, the exponential average of the batches alone, without
        the values that the buffers began with (Kingma & Ba 2014, section 3).
    """
    if momentum is None:
        # as torch: without a count there is no average
        return 0.0 if batches is None else 1 / (batches + 1).double()
    if not debiased or batches is None or momentum == 0:
        return momentum
    return momentum / (1 - (1 - momentum) ** (batches + 1).double())


def established(momentum: float | None) -> int:
    """As how many batches statistics count that came without a number, where the rate depends on it.

    So many that an exponential average has forgotten what it began with, to a thousandth; and that the next batch
    enters a cumulative one at torch's default rate, a tenth.
    """
    if momentum is None:
        return 9
    return math.ceil(math.log(1e-3) / math.log1p(-momentum)) if 0 < momentum < 1 else 1


def untouched(holder: nn.Module) -> Tensor | None:
    """Whether the statistics of `holder` are those a layer begins with, a 0-dimensional bool; None without any."""
    mean, var = holder._buffers["running_mean"], holder._buffers["running_var"]
    return None if mean is None or var is None else ((mean == 0) & (var == 1)).all()


def establish(holder: nn.Module, momentum: float | None) -> None:
    """Let the statistics of `holder`, which have come from elsewhere, count as `established` if they have no number."""
    batches, new = holder._buffers["num_batches_tracked"], untouched(holder)
    if batches is not None and new is not None:
        unknown = (batches == 0) & ~new
        batches.copy_(torch.where(unknown, established(momentum), batches))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics of a layer converted to `dtype`, even one it can only be stored in (float8)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(module: nn.Module) -> None:
    """Make the running statistics of `module` float32 or wider, and contiguous: those of activations are seen flat."""
    for name in STATISTICS:
        values = module._buffers[name]
        if values is not None and not is_lazy(values):
            module._buffers[name] = values.to(wide(values.dtype)).contiguous()


def narrow(module: nn.Module) -> None:
    """Make the running statistics of `module` as wide as its weight, as torch's layers keep them."""
    weight = module._parameters["weight"]
    for name in STATISTICS:
        values = module._buffers[name]
        if values is not None and weight is not None:
            module._buffers[name] = values.to(weight.dtype)


def apply_widely(module: nn.Module, apply: Callable[[], object]) -> None:
    """`apply`, nn.Module's own, after which running statistics are on another device but not of a narrower dtype.

    They would stop moving: in bfloat16 a mean of 100 is never reached from below 96.
    """
    before = {name: module._buffers[name] for name in STATISTICS}
    apply()
    for name, values in before.items():
        after = module._buffers[name]
        if values is None or after is None or is_lazy(after):
            continue
        if after.dtype != wide(after.dtype):
            module._buffers[name] = values.to(after.device, wide(after.dtype))
    widen(module)


def flat(holder: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The running mean and variance of `holder`, (C,) each, a view of those of single activations."""
    buffers = holder._buffers  # an attribute of a module costs a microsecond
    mean, var = buffers["running_mean"], buffers["running_var"]
    if mean is None or mean.dim() == 1:
        return mean, var
    assert var is not None
    if not (mean.is_contiguous() and var.is_contiguous()):
        raise RuntimeError("running statistics of single activations are seen flat and must be contiguous")
    return mean.flatten(), var.flatten()


class RunningStatistics(nn.Module):
    """A set of them called `name`, with the shapes, dtype and device of those `like` which it is."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    given: bool = False  # whether they have come from elsewhere since the last batch, see `establish`

    def __init__(self, like: Tensor, name: str) -> None:
        super().__init__()
        self.name = name
        with torch.inference_mode(False):  # or no training could move them ever
            self.register_buffer("running_mean", torch.zeros_like(like))
            self.register_buffer("running_var", torch.ones_like(like))
            self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=like.device))

    def reset(self) -> None:
        """As if no batch had been seen."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        apply_widely(self, lambda: super(RunningStatistics, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        widen(self)
        self.given = True
