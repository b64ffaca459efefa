"""How the values that come to a layer are distributed: moments and percentiles, by channel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PERCENTILES = (0.15, 0.50, 0.85)

# Values of a tensor that are sorted, and the fewest of a channel: sorting is what a look costs. The error that it makes
# in a percentile is below that which a batch of 32 images has itself.
_SORTED = 2**16
_FEWEST = 256
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Distribution:
    """Of a tensor (N, C, *S).

    mean, variance: (C,), biased, as a batch is normalised.
    mean_error, variance_error: (C,), squares of their standard errors, taking examples for independent; nan of a
        single one.
    percentiles: (3, C), the 15th, 50th and 85th of each channel.
    of_all: (3,), those of all values.
    """

    mean: Tensor
    variance: Tensor
    mean_error: Tensor
    variance_error: Tensor
    percentiles: Tensor
    of_all: Tensor

    def settled(self) -> Distribution:
        """The same in float64 on the CPU; waits for the device."""
        return Distribution(*(each.cpu().double() for each in vars(self).values()))

    @property
    def std(self) -> Tensor:
        """(C,) standard deviations."""
        return self.variance.sqrt()

    @property
    def varies(self) -> Tensor:
        """(C,) whether a channel is more than one value."""
        return self.variance > 1e-12 * self.mean.square() + 1e-30

    @property
    def width(self) -> Tensor:
        """(C,) from the 15th to the 85th percentile."""
        return self.percentiles[2] - self.percentiles[0]

    @property
    def is_finite(self) -> bool:
        """Whether all values were."""
        return bool(self.mean.isfinite().all() and self.variance.isfinite().all())


@torch.no_grad()
def distribution(x: Tensor, dim: int | None) -> Distribution:
    """Of the input of a layer, in float32 or wider, on its device; nothing waits for it.

    Percentiles are linear between values, as torch.quantile's. They are those of the whole tensor if each channel has
    no more than max(256, 65,536 / C) values, otherwise of so many, evenly spread over examples and places, the same
    ones each time.

    dim: of the channels; None: each number of an example is one.
    """
    values = x.detach()
    values = values.flatten(1) if dim is None else values.movedim(dim, 1)
    values = values if values.dtype == torch.float64 else values.float()
    values = values.reshape(*values.shape[:2], -1)
    number = len(values)
    within, means = torch.var_mean(values, 2, correction=0)
    mean = means.mean(0)
    spreads = within + (means - mean).square()  # of each example, about the mean of the batch
    unknown = torch.full_like(mean, math.nan)
    some = _some(values)
    at = values.new_tensor(PERCENTILES)
    return Distribution(
        mean,
        spreads.mean(0),
        means.var(0) / number if number > 1 else unknown,
        spreads.var(0) / number if number > 1 else unknown,
        torch.quantile(some, at, dim=0),
        torch.quantile(some.flatten(), at),
    )


def _some(values: Tensor) -> Tensor:
    """(M, C) of (N, C, S): all, or as many as are sorted."""
    examples, channels, size = values.shape
    number, most = examples * size, max(_FEWEST, _SORTED // channels)
    if number <= most:
        return values.transpose(1, 2).reshape(number, channels)
    # A stride that divides the width of an image would see a few of its columns only: multiples of the golden section
    # are spread evenly at every scale, and without a common divisor none comes twice.
    stride = round(_GOLDEN * number)
    while math.gcd(stride, number) > 1:
        stride += 1
    places = torch.arange(most, device=values.device) * stride % number
    return values[places // size, :, places % size]
