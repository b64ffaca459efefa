"""One batch over many processes: moments merged over the ranks of a process group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from batchnorm.kernels.observers import transformed
from batchnorm.layer_path import Name
from batchnorm.moments import Moments
from batchnorm.statistics.batch import Batch, Statistics
from batchnorm.statistics.process_group import Ranks


@dataclass(frozen=True)
class Sync(Statistics):
    """Normalise by the moments of the samples of all ranks together, as one process would normalise them.

    Forward, each rank's count, mean and m2 are gathered, (2 + 2·C) float64 a rank, and merged as `Moments.merge`
    does; backward, Σ g and Σ g·x̂, 2 + 2·C float64, are summed. The count travels along: ranks may hold different
    numbers of samples, or none. So does a number that identifies the layer: ranks that call different ones all
    raise. Gradients of weight and bias are those of a rank's own samples, whose sum over the ranks (DDP takes the mean)
    is the whole.

    Any backend that can do these two collectives, gloo on a CPU among them. Alone (world size 1, or no process group at
    all) a layer is as fast as without it, and in evaluation nothing is exchanged. No paper describes it; the merge is
    that of Chan, Golub & LeVeque 1979.

    Args:
        process_group: whose ranks; None: all of them. It cannot be pickled: a Sync of a group comes back from a pickle
            without it and must get it again.

    Raises:
        RuntimeError: when called; names the layer when another rank is gone or does not come within the group's
            timeout, and the layers of all ranks when they differ (tensors on a CPU, not compiled). Also within
            torch.func's transforms and forward-mode gradients, for a process that is not of the group, and for a Sync
            that has lost its group in a pickle.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm2d(8, statistics=bn.Sync())  # the same in every process, under torchrun
        >>> x = torch.randn(16, 8, 7, 7)
        >>> torch.equal(layer(x), bn.BatchNorm2d(8)(x))  # here there is one process
        True
    """

    process_group: Any = field(default=None)

    def __call__(self, batch: Batch) -> tuple[Tensor, Moments | None]:
        if self._alone():
            return batch.normalised()
        if transformed():
            raise RuntimeError(
                "Sync cannot be combined with torch.func's transforms (vmap, grad, ...) and forward-mode gradients: "
                "ranks could not exchange what is being transformed"
            )
        return batch.normalised(exchange=Ranks(self.process_group, batch.layer()))

    def merged(self, own: Moments, layer: str) -> Moments:
        """The moments of all ranks together, from those of each; every rank must call it.

        Args:
            own: of this rank, mean and m2 of shape (C,).
            layer: for messages: the layer that they are of.

        Returns: the merged moments, the same on every rank; `own` itself where there is one process.

        Raises:
            RuntimeError: another rank is gone or does not come within the group's timeout.

        Example:
            >>> import torch, batchnorm as bn
            >>> own = bn.Moments.of(torch.randn(16, 8))
            >>> bn.Sync().merged(own, "layer1.bn") is own
            True
        """
        if self._alone():
            return own
        return Ranks(self.process_group, Name(layer), "merged moments").moments(lambda: own)

    def _alone(self) -> bool:
        if isinstance(self.process_group, LostGroup):
            raise RuntimeError(
                f"this Sync was of a process group of ranks {self.process_group.ranks}, which could not be pickled: "
                "give the layer a new one, layer.statistics = bn.Sync(process_group)"
            )
        if not dist.is_available() or not dist.is_initialized():
            return True
        size = dist.get_world_size(self.process_group)
        if size < 1:
            raise RuntimeError(f"rank {dist.get_rank()} is not one of this Sync's process group")
        return size == 1

    def __copy__(self) -> Sync:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Sync:
        return self  # a copy of a layer is in the same group

    def __reduce__(self) -> tuple[Any, ...]:
        group = self.process_group
        if group is None or isinstance(group, LostGroup):
            return Sync, (group,)
        return Sync, (LostGroup(tuple(dist.get_process_group_ranks(group))),)


@dataclass(frozen=True)
class LostGroup:
    """What is left of a process group in a pickle."""

    ranks: tuple[int, ...]
