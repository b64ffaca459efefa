"""Frozen statistics: a layer that is trained as it will be used."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.statistics.batch import Batch, Statistics


def thawed(statistics: Statistics | None) -> Statistics | None:
    """`statistics`, or what they were before they were frozen."""
    return statistics.instead_of if isinstance(statistics, Population) else statistics


@dataclass(frozen=True)
class Population(Statistics):
    """Normalise training batches by the running statistics, which are constants and stay as they are.

        x̂ = (x - running_mean) / √(running_var + eps)

    As in evaluation (Ioffe & Szegedy 2015, algorithm 2, line 11), but `.train()` does not end it: a frozen layer is
    what requires_grad=False on weight and bias does not make. `freeze` gives it to all layers of a model.

    Args:
        instead_of: the layer's `statistics` before it was frozen, which `unfreeze` brings back.

    Raises:
        RuntimeError: when a layer without running statistics is called in training.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm1d(8, statistics=bn.Population())
        >>> x = torch.randn(16, 8)
        >>> torch.equal(layer.train()(x), layer.eval()(x)), int(layer.num_batches_tracked)
        (True, 0)
    """

    instead_of: Statistics | None = None

    def __call__(self, batch: Batch) -> tuple[Tensor, Moments | None]:
        if batch.running_mean is None:
            raise RuntimeError(
                "Population() normalises by running statistics, and this layer keeps none: "
                "make it with track_running_stats=True"
            )
        return batch.normalised(training=False)
