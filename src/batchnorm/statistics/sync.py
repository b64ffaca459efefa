"""One batch over many processes: moments merged over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm import functional
from batchnorm.kernels.observers import transformed
from batchnorm.moments import Moments
from batchnorm.statistics.batch import Batch, Statistics

# torch's newer name, and its older one
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass(frozen=True)
class Sync(Statistics):
    """Normalise by the moments of the samples of all ranks together, as one process would normalise them.

    Forward, each rank's count, mean and m2 are gathered, (1 + 2·C) float64 a rank, and merged as `Moments.merge`
    does; backward, Σ g and Σ g·x̂, 2·C float64, are summed. The count travels along: ranks may hold different
    numbers of samples, or none. Gradients of weight and bias are those of a rank's own samples, whose sum over the
    ranks (DDP takes the mean) is the whole.

    Any backend that can do these two collectives, gloo on a CPU among them. Alone (world size 1, or no process group at
    all) a layer is as fast as without it, and in evaluation nothing is exchanged. No paper describes it; the merge is
    that of Chan, Golub & LeVeque 1979.

    Args:
        process_group: whose ranks; None: all of them. It cannot be pickled: a Sync of a group comes back from a pickle
            without it and must get it again.

    Raises:
        RuntimeError: when called; names the layer when another rank is gone or does not come within the group's
            timeout. Also within torch.func's transforms and forward-mode gradients, for a process that is not of the
            group, and for a Sync that has lost its group in a pickle.

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
        return batch.normalised(exchange=_Ranks(self.process_group, batch.layer()))

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
        return own if self._alone() else _Ranks(self.process_group, layer).moments(lambda: own)

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


@dataclass(frozen=True)
class _Ranks:
    """The ranks of a group, each with a part of the batch."""

    group: Any
    layer: str
    others: bool = True

    def moments(self, own: Callable[[], Moments]) -> Moments:
        mine = own()
        channels = mine.mean.size(0)
        own_count = torch.as_tensor(mine.count, dtype=mine.mean.dtype, device=mine.mean.device).reshape(-1)
        packed = torch.cat([own_count, mine.mean, mine.m2])
        counts, means, m2s = self._gather(packed).split([own_count.numel(), channels, channels], dim=1)
        merged = functional.total(Moments(counts, means, m2s))
        count = merged.count
        if isinstance(count, int) or count.dim() > 0 or not count.is_cpu or torch.compiler.is_compiling():
            return merged
        return Moments(int(count), merged.mean, merged.m2)

    def sums(self, own: Tensor) -> Tensor:
        return self._named(lambda: _sum(own.clone(), self.group), "its gradient's sums")

    def _gather(self, row: Tensor) -> Tensor:
        return self._named(lambda: _Gather.apply(row, self), "its moments")

    def _named(self, collective: Callable[[], Any], what: str) -> Tensor:
        try:
            found: Tensor = collective()
        except RuntimeError as error:
            raise RuntimeError(
                f"layer {self.layer}: rank {dist.get_rank()} could not exchange {what} with the group's other ranks, "
                f"one of which is gone, hangs or took another way through the model: {error}"
            ) from error
        return found


# All rows, (ranks, values), of one each; the gradient of a row is the sum of what the ranks did with it.
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor, ranks: _Ranks) -> Tensor:
        ctx.ranks = ranks
        rows = row.new_empty(dist.get_world_size(ranks.group) * row.numel())
        _all_gather(rows, row, group=ranks.group)
        return rows.reshape(-1, row.numel())

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor) -> tuple[Tensor, None]:
        total: Tensor = _Sum.apply(of_rows, ctx.ranks)
        return total[dist.get_rank(ctx.ranks.group)], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: _Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sums(values)

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(of_sum, ctx.ranks), None


def _sum(values: Tensor, group: Any) -> Tensor:
    dist.all_reduce(values, group=group)
    return values
