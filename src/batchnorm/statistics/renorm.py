"""Batch Renormalization: training outputs that do not depend on which samples came together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batchnorm import functional
from batchnorm.kernels.observers import captured, recomputing, transformed
from batchnorm.kernels.reference import mean_and_variance
from batchnorm.moments import Moments
from batchnorm.statistics.batch import Batch, Statistics


@dataclass(frozen=True)
class Ramp:
    """A limit that goes in a straight line from `start` to `stop` while the step goes from `begin` to `end`.

    For `Renorm`, whose limits the paper relaxes so (Ioffe 2017, section 4).

    Args:
        start: the limit until step `begin`.
        stop: the limit from step `end` on.
        begin: a step, 0 or later: a number of training batches.
        end: a step after `begin`.

    Raises:
        ValueError: `begin` is below 0, or `end` is not after it.

    Example:
        >>> import batchnorm as bn
        >>> layer = bn.BatchNorm2d(8, statistics=bn.Renorm(rmax=bn.Ramp(1, 3, begin=5_000, end=40_000), dmax=0))
        >>> layer.statistics.rmax
        Ramp(start=1, stop=3, begin=5000, end=40000)
    """

    start: float
    stop: float
    begin: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise ValueError(f"a Ramp begins before it ends, at a step of 0 or later, got {self}")

    def __call__(self, step: Tensor) -> Tensor:
        """The limit at `step`.

        Args:
            step: how many batches the running statistics have seen, a 0-dimensional integer tensor.

        Returns: the limit, a 0-dimensional float64 tensor.

        Example:
            >>> import torch, batchnorm as bn
            >>> ramp = bn.Ramp(1, 3, begin=100, end=200)
            >>> [ramp(torch.tensor(step)).item() for step in (0, 150, 300)]
            [1.0, 2.0, 3.0]
        """
        part = ((step.double() - self.begin) / (self.end - self.begin)).clamp(0, 1)
        return self.start + (self.stop - self.start) * part


Limit = float | Callable[[Tensor], Tensor | float]


@dataclass(frozen=True)
class Renorm(Statistics):
    """Normalise as evaluation would, as far as the limits allow (Ioffe 2017, algorithm 1).

        x̂ = (x - mean) / σ · r + d
        r = clip(σ / σ_run, 1/rmax, rmax)      d = clip((mean - running_mean) / σ_run, -dmax, dmax)

    with σ = √(variance + eps) of the batch, biased, and σ_run = √(running_var + eps). r and d are constants to the
    gradient. Within the limits x̂ is (x - running_mean) / σ_run; with rmax=1, dmax=0 this is batch normalization,
    with which training should begin, as long as the running statistics say little.

    Args:
        rmax: the largest factor by which the batch's scale is corrected, at least 1; or a function of the step (`Ramp`,
            say): how many batches the running statistics have seen, a 0-dimensional int64 tensor.
        dmax: the largest shift, in running standard deviations, at least 0; or a function of the step.

    Raises:
        ValueError: `rmax` is below 1 or `dmax` below 0.
        RuntimeError: when called, for a layer without running statistics, and in a recomputation (activation
            checkpointing), which would see other running statistics than the first pass.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm2d(8, statistics=bn.Renorm(rmax=1, dmax=0))  # no correction yet
        >>> x = torch.randn(16, 8, 7, 7)
        >>> torch.allclose(layer(x), bn.BatchNorm2d(8)(x), atol=1e-5)
        True
    """

    rmax: Limit = 3.0
    dmax: Limit = 5.0

    def __post_init__(self) -> None:
        if not callable(self.rmax) and not self.rmax >= 1:
            raise ValueError(f"Renorm's rmax is at least 1 (1 does not correct at all), got {self.rmax}")
        if not callable(self.dmax) and not self.dmax >= 0:
            raise ValueError(f"Renorm's dmax is at least 0 (0 does not correct at all), got {self.dmax}")

    @classmethod
    def scheduled(cls) -> Renorm:
        """The paper's limits: no correction for 5,000 steps, then rmax to 3 by step 40,000 and dmax to 5 by 25,000.

        Returns: a Renorm with a `Ramp` for each limit (Ioffe 2017, section 4).

        Example:
            >>> import batchnorm as bn
            >>> bn.Renorm.scheduled().dmax
            Ramp(start=0, stop=5, begin=5000, end=25000)
        """
        return cls(Ramp(1, 3, 5_000, 40_000), Ramp(0, 5, 5_000, 25_000))

    def __call__(self, batch: Batch) -> tuple[Tensor, Moments | None]:
        if batch.running_mean is None or batch.running_var is None or batch.step is None:
            raise RuntimeError(
                "Renorm corrects towards running statistics, and this layer keeps none: "
                "make it with track_running_stats=True"
            )
        if recomputing():
            raise RuntimeError(
                "Renorm cannot be combined with activation checkpointing: what is computed again in the backward "
                "pass would be corrected towards running statistics that have moved"
            )
        own = functional.moments(batch.input, batch.mask)
        mean, variance = mean_and_variance(own)
        running = (batch.running_var.to(mean.dtype) + batch.eps).sqrt()
        ratio = (variance + batch.eps).sqrt() / running
        distance = (mean - batch.running_mean) / running
        # functions may return what a number may not be
        rmax = _at(self.rmax, batch.step).to(mean).clamp(min=1)
        dmax = _at(self.dmax, batch.step).to(mean).clamp(min=0)
        r, d = _constant(ratio.clamp(1 / rmax, rmax)), _constant(distance.clamp(-dmax, dmax))
        weight, bias = batch.weight, batch.bias
        corrected = replace(
            batch,
            weight=r if weight is None else weight * r,
            bias=_sum(bias, d if weight is None else weight * d),
        )
        return corrected.normalised(exchange=_Known(own))


def _constant(values: Tensor) -> Tensor:
    """`values` without their history; forward-mode gradients are not stopped by no_grad."""
    return _saved(values) if torch.compiler.is_compiling() and not captured() else values.detach()


# What a compiler cannot look into it saves for the backward pass. Else it would compute r and d again, from running
# statistics that have moved.
@torch.library.custom_op("batchnorm::saved", mutates_args=())
def _saved(values: Tensor) -> Tensor:
    return values.clone()


@_saved.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def _at(limit: Limit, step: Tensor) -> Tensor:
    return torch.as_tensor(limit(step) if callable(limit) else limit, dtype=torch.float64)


def _sum(bias: Tensor | None, shift: Tensor) -> Tensor:
    return shift if bias is None else bias + shift


@dataclass(frozen=True)
class _Known:
    """The moments have been taken already, but for autograd, which has to see how they depend on the input."""

    known: Moments
    others: bool = False

    def moments(self, own: Callable[[], Moments]) -> Moments:
        return own() if torch.is_grad_enabled() or transformed() else self.known

    def sums(self, own: Tensor) -> Tensor:
        return own
