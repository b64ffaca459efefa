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

    As in evaluation, but `.train()` does not end it: a frozen layer is what requires_grad=False on weight and bias
    does not make.

    instead_of: what the layer did before and `unfreeze` brings back.

    Raises, when called: RuntimeError for a layer without running statistics.
    """

    instead_of: Statistics | None = None

    def __call__(self, batch: Batch) -> tuple[Tensor, Moments | None]:
        if batch.running_mean is None:
            raise RuntimeError(
                "Population() normalises by running statistics, and this layer keeps none: "
                "make it with track_running_stats=True"
            )
        return batch.normalised(training=False)
