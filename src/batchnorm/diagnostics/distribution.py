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
# Values of which there is a copy at a time: a look must fit beside a training that fills the memory.
_AT_ONCE = 2**20
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
    values = values.reshape(*values.shape[:2], -1)
    means, spreads = _moments(values)
    some = _wide(_some(values))
    at = some.new_tensor(PERCENTILES)
    return Distribution(
        means.mean(0),
        spreads.mean(0),
        _error(means),
        _error(spreads),
        torch.quantile(some, at, dim=0),
        torch.quantile(some.flatten(), at),
    )


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) each: of each example its mean, and the mean of (x - mean of the batch)²; some examples at a time."""
    parts = values.split(max(1, _AT_ONCE // values[0].numel()))
    means = torch.cat([_wide(part).mean(2) for part in parts])
    mean = means.mean(0)[:, None]
    return means, torch.cat([(_wide(part) - mean).square_().mean(2) for part in parts])


def _error(values: Tensor) -> Tensor:
    """(C,) of (N, C), the square of the standard error of their mean; nan of one."""
    number = len(values)
    # not var(0), which takes ten times as long on a CPU
    return (values - values.mean(0)).square().sum(0) / number / (number - 1 or math.nan)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


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
