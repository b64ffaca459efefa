"""One normalisation beside its tensors: how it is to be done, and what came of it.

A layer makes a Call, and hands it down with x, weight, bias and residual: functional → dispatch → node → native.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from batchnorm.moments import Moments, statistics_dtype

if TYPE_CHECKING:
    from batchnorm.kernels.padding import Padding

Activation = str | Callable[[Tensor], Tensor] | None
FixedStatistics = tuple[Tensor, Tensor]  # a mean and a variance, (C,) each: constants to the gradient
Fused = tuple[int, float]  # an activation's number in the native kernels, and its slope
NOT_FUSED: Fused = (0, 0.0)


class Exchange(Protocol):
    """What stands between the values of one call and the moments they are normalised by: other ranks, say."""

    @property
    def others(self) -> bool:
        """Whether others than the values at hand have a say."""

    def moments(self, own: Callable[[], Moments]) -> Moments:
        """The moments to normalise by; `own()` are those of the values at hand. Differentiable as `own()` is."""

    def sums(self, own: Tensor) -> Tensor:
        """Σ g and Σ g·x̂, (2, C), over all that `moments` speaks of, from those over the values at hand."""


class Kernels(Protocol):
    """Kernels that compute a whole normalisation, and its gradients, in one call: the module `native`, say."""

    def moments(self, x: Tensor, group: int = 0) -> Tensor:
        """See native.moments."""

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
    ) -> Tensor:
        """See native.forward."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        call: Call,
        statistics: Tensor | FixedStatistics | None = None,
        averages: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """See native.backward."""

    def sums(
        self,
        dy: Tensor,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        call: Call,
    ) -> Tensor:
        """See native.sums."""


class Call:
    """How `x`, (N, C, *S), is normalised.

    training: by the batch's moments; else by the running statistics, which are constants.
    eps, activation: of the layer.
    running_mean, running_var: (C,) or None.
    rate: the weight of the batch in the running statistics; None: they stay as they are.
    batches: int64, 0-dimensional; counts the batches that enter the running statistics.
    skipped: the same of those that do not; kernels that cannot count there leave it to the layer.
    mask: (N, 1, *S) or (N, C, *S) bool, see moments.positions: which positions have a say.
    group: in training, so many samples at a time have moments of their own; 0: all have the same.
    exchange: in training, what makes other moments of those of x.

    The kernels set:
    kernels: those that compute in one call, native's or Triton's.
    fused: what the native kernels are to do after the normalisation.
    padding: what the mask leaves out, once it is filled.
    stepwise: something stands between the moments and the output, so that one native call cannot do all.
    statistics: the mean and variance to normalise by, where they do not come from x within one native call.
    stats, count: mean and m2 of x, (2, C) or (2, groups, C) float64, that a native call found, of so many values each.
    found: the count, mean and unbiased variance of x that torch's operator found.
    moments: what x was normalised by, where it was not one native call that found them: see batch_moments.
    updates_inline: the native call that finds the moments may update the running statistics too: nothing else follows.
    updated: whether the batch entered the running statistics; a bool tensor where a device would have to be waited for,
        None while they have not been updated.
    """

    __slots__ = (
        "activation", "batches", "count", "eps", "exchange", "found", "fused", "group", "kernels", "mask", "moments",
        "padding", "rate", "running_mean", "running_var", "skipped", "statistics", "stats", "stepwise", "training",
        "updated", "updates_inline",
    )  # fmt: skip

    def __init__(
        self,
        training: bool,
        eps: float,
        activation: Activation = None,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        rate: float | Tensor | None = None,
        batches: Tensor | None = None,
        mask: Tensor | None = None,
        group: int = 0,
        exchange: Exchange | None = None,
    ) -> None:
        self.training, self.eps, self.activation = training, eps, activation
        self.running_mean, self.running_var, self.rate, self.batches = (
            running_mean,
            running_var,
            rate,
            batches,
        )
        self.mask, self.group, self.exchange = mask, group, exchange
        self.skipped: Tensor | None = None
        self.stepwise = training and exchange is not None
        self.fused = NOT_FUSED
        self.padding: Padding | None = None
        self.statistics: FixedStatistics | None = None
        if not training and running_mean is not None and running_var is not None:
            self.statistics = running_mean, running_var
        self.stats: Tensor | None = None
        self.count: int | Tensor = 0
        self.updates_inline = False
        self.updated: bool | Tensor | None = None
        self.found: tuple[int, Tensor, Tensor] | None = None
        self.moments: Moments | None = None
        self.kernels: Kernels | None = None

    @property
    def fixed(self) -> FixedStatistics | None:
        """The running statistics where they are what x is normalised by."""
        return None if self.training else self.statistics

    def batch_moments(self) -> Moments | None:
        """What x was normalised by, detached; None where that were the running statistics."""
        if self.moments is None and self.stats is not None and self.training:
            self.moments = Moments(self.count, self.stats[0], self.stats[1])
        elif self.moments is None and self.found is not None:
            count, mean, variance = self.found
            wide = statistics_dtype(mean.device)
            self.moments = Moments(count, mean.to(wide), variance.to(wide) * (count - 1))
        return self.moments
