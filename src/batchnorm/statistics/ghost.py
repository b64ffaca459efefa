"""Ghost batches: moments for each group of a few samples, in batches as large as the machine likes them."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor

from batchnorm import functional
from batchnorm.kernels.observers import captured
from batchnorm.moments import Moments, count_per_channel
from batchnorm.statistics.batch import Batch, Statistics


@dataclass(frozen=True)
class Ghost(Statistics):
    """Normalise each `size` consecutive samples by their own moments (Hoffer, Hubara & Soudry 2017, algorithm 1).

        x̂ᵢ = (xᵢ - mean_g) / √(variance_g + eps)      g = min(⌊i / size⌋, ⌊N / size⌋ - 1)

    Samples that are left over join the last group, so that no group is smaller than `size`, unless the batch is.
    Running statistics follow the moments of the whole batch, all groups merged: evaluation is that of a plain layer.

    On a CPU one call of the native kernels, forward and backward; never a loop in Python.

    Args:
        size: number of samples in a group, at least 1.

    Raises:
        ValueError: `size` is not a whole number, or below 1.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm2d(8, statistics=bn.Ghost(16))
        >>> x = torch.randn(32, 8, 7, 7)
        >>> torch.allclose(layer(x)[:16], bn.BatchNorm2d(8)(x[:16]), atol=1e-5)
        True
    """

    size: int

    def __post_init__(self) -> None:
        try:
            size = operator.index(self.size)
        except TypeError:
            size = 0
        if size < 1:
            raise ValueError(f"Ghost(size) is a whole number of samples and at least 1, got {self.size!r}")

    def __call__(self, batch: Batch) -> tuple[Tensor, Moments | None]:
        # a captured graph is for batches of any size
        if not captured() and (self.size >= batch.input.size(0) or batch.input.numel() == 0):
            return batch.normalised()
        output, of_groups = batch.normalised(group=self.size)
        assert of_groups is not None
        whole = functional.total(of_groups)
        if batch.mask is not None:
            return output, whole
        return output, Moments(count_per_channel(batch.input), whole.mean, whole.m2)
