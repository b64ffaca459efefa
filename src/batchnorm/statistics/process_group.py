"""What the ranks of a process group exchange for a layer, and the check that all of them do it for the same layer.

Collectives on tensors of unequal sizes abort a process or return garbage, and those of equal sizes mix two layers
silently. So each rank's tensor starts with a number that identifies the layer and what is wanted of it, and no rank
brings a tensor of another size than the others expect. They expect that a step repeats the one before: all ranks of a
group take part in the same exchanges, so they expect the same. A rank that wants something else takes part in the
expected collective with zeros; the numbers then tell every rank whether all want the same. If they do, they exchange
it; otherwise every rank raises. A step that repeats the one before has no further collectives.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm import functional
from batchnorm.layer_path import Name
from batchnorm.moments import Moments

# torch's newer name, and its older one
all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class RanksDiffer(RuntimeError):
    """The ranks of a group do not call the same layers."""


class _Collective(NamedTuple):
    name: Literal["all_gather", "all_reduce"]
    size: int  # of a rank's tensor, its head included
    dtype: torch.dtype

    @property
    def head_size(self) -> int:
        return 1 if self.name == "all_gather" else 2

    def head(self, number: int) -> list[int]:
        """What each rank's tensor starts with."""
        return [number, number**2][: self.head_size]

    def empty(self, number: int) -> Tensor:
        """What a rank brings that wants another collective."""
        values = torch.zeros(self.size, dtype=self.dtype)
        values[: self.head_size] = torch.tensor(self.head(number))
        return values

    def run(self, own: Tensor, group: Any) -> Tensor:
        """All ranks' tensors, (ranks, size), or their sum."""
        if self.name == "all_reduce":
            dist.all_reduce(own, group=group)
            return own
        found = own.new_empty(dist.get_world_size(group) * self.size)
        all_gather(found, own, group=group)
        return found.reshape(-1, self.size)

    def agreed(self, found: Tensor, number: int, ranks: int) -> bool:
        """Whether all ranks brought this number."""
        if self.name == "all_gather":
            return found[:, 0].tolist() == [number] * ranks
        # all are m if and only if they sum to n·m, and their squares to n·m²
        return found[:2].tolist() == [ranks * number, ranks * number**2]


class _Wanted(NamedTuple):
    """What a rank wants to exchange."""

    path: str  # of the layer
    what: str
    by: _Collective

    def number(self) -> int:
        """Of 20 bits: float64 is exact for the sum of its squares over up to 8,192 ranks."""
        return zlib.crc32(repr(self).encode()) >> 12

    def agrees(self, other: _Wanted) -> bool:
        """Whether they are the same, but for a wrapper (such as DDP) around the model of one."""
        short, long = sorted((self.path, other.path), key=len)
        return self[1:] == other[1:] and (short == long or long.endswith(f".{short}"))


_LONGEST_STEP = 10_000  # exchanges; in a longer step each is preceded by one of the number alone
_UNKNOWN = _Collective("all_gather", 1, torch.float64)


class _History:
    """The exchanges of a group, and the place in them that the present repeats. The same on each of its ranks."""

    def __init__(self) -> None:
        self._past: list[tuple[int, _Collective]] = []
        self._latest: dict[int, int] = {}  # the last place of each number
        self._place = 0

    def expected(self) -> _Collective:
        return self._past[self._place][1] if self._place < len(self._past) else _UNKNOWN

    def add(self, number: int, collective: _Collective) -> None:
        past = self._past
        repeats = self._place < len(past) and past[self._place][0] == number
        self._place = 1 + (self._place if repeats else self._latest.get(number, len(past)))
        self._latest[number] = len(past)
        past.append((number, collective))
        if len(past) == 2 * _LONGEST_STEP:
            del past[:_LONGEST_STEP]
            self._place = max(self._place - _LONGEST_STEP, 0)
            self._latest = {number: place for place, (number, _) in enumerate(past)}


class _Protocol:
    """The exchanges of a group, each under the number of what is wanted."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._ranks = dist.get_world_size(group)
        self._history = _History()
        self._numbers: dict[_Wanted, int] = {}

    def number(self, wanted: _Wanted) -> int:
        known = self._numbers.get(wanted)
        if known is None:
            known = self._numbers[wanted] = wanted.number()
        return known

    def exchanged(self, wanted: _Wanted, own: Tensor, layer: Name) -> Tensor:
        expected, number = self._history.expected(), self.number(wanted)
        as_expected = expected == wanted.by
        brought = own if as_expected else expected.empty(number)
        found = expected.run(brought, self._group)
        if not expected.agreed(found, number, self._ranks):
            number = self._numbers[wanted] = self._settled(wanted, layer)
        if not as_expected:
            found = wanted.by.run(own, self._group)
        self._history.add(number, wanted.by)
        return found

    def _settled(self, wanted: _Wanted, layer: Name) -> int:
        """The number, from now on, of what all ranks want but name differently.

        Raises:
            RanksDiffer: they want different things.
        """
        everyone: list[tuple[_Wanted, str]] = [(wanted, "")] * self._ranks
        dist.all_gather_object(everyone, (wanted, str(layer)), group=self._group)
        if all(wanted.agrees(other) for other, _ in everyone):
            shortest = min((other for other, _ in everyone), key=lambda other: len(other.path))
            return shortest.number()
        found: dict[str, list[int]] = {}
        for rank, (other, name) in zip(dist.get_process_group_ranks(self._group), everyone, strict=True):
            what = f"the {other.what} of layer {name}, {other.by.size - other.by.head_size} numbers"
            found.setdefault(what, []).append(rank)
        raise RanksDiffer(
            "the ranks of a process group are not at the same layer with Sync: "
            + "; ".join(
                f"rank{'s' * (len(ranks) > 1)} {str(ranks)[1:-1]}: {what}" for what, ranks in found.items()
            )
            + ". Each rank must call the same layers with Sync in the same order, whatever its data"
        )


_protocols: WeakKeyDictionary[Any, _Protocol] = WeakKeyDictionary()


def _protocol(group: Any) -> _Protocol:
    key = dist.group.WORLD if group is None else group
    known = _protocols.get(key)
    if known is None:
        known = _protocols[key] = _Protocol(group)
    return known


@dataclass(frozen=True)
class Ranks:
    """The ranks of a group, each with a part of the batch; an `Exchange`.

    group: whose ranks; None: all of them.
    layer: whose moments.
    what: name of the moments; one layer may exchange several kinds.
    """

    group: Any
    layer: Name
    what: str = "moments"
    others: bool = True

    def moments(self, own: Callable[[], Moments]) -> Moments:
        mine = own()
        mean, channels = mine.mean, mine.mean.size(0)
        own_count = torch.as_tensor(mine.count, dtype=mean.dtype, device=mean.device).reshape(-1)
        sizes = [1, own_count.numel(), channels, channels]
        wanted = _Wanted(self.layer.path, self.what, _Collective("all_gather", sum(sizes), mean.dtype))
        rows: Tensor = _Gather.apply(
            torch.cat([self._head(wanted, mean), own_count, mean, mine.m2]), self, wanted
        )
        _, counts, means, m2s = rows.split(sizes, dim=1)
        merged = functional.total(Moments(counts, means, m2s))
        count = merged.count
        if isinstance(count, int) or count.dim() > 0 or not count.is_cpu or torch.compiler.is_compiling():
            return merged
        return Moments(int(count), merged.mean, merged.m2)

    def sums(self, own: Tensor) -> Tensor:
        wanted = _Wanted(
            self.layer.path, "gradient's sums", _Collective("all_reduce", 2 + own.numel(), own.dtype)
        )
        packed = torch.cat([self._head(wanted, own), own.reshape(-1)])
        return self.exchanged(wanted, packed)[2:].view(own.shape)

    def exchanged(self, wanted: _Wanted, own: Tensor) -> Tensor:
        """What `wanted.by.run` returns, after it has been checked; `own` starts with a `_head`."""
        try:
            if self._unchecked(own):
                return wanted.by.run(own, self.group)
            return _protocol(self.group).exchanged(wanted, own, self.layer)
        except RanksDiffer:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"layer {self.layer}: rank {dist.get_rank()} could not exchange its {wanted.what} with the group's "
                f"other ranks, one of which is gone, hangs or took another way through the model: {error}"
            ) from error

    def _head(self, wanted: _Wanted, values: Tensor) -> Tensor:
        if self._unchecked(values):
            return values.new_zeros(wanted.by.head_size)
        return torch.tensor(wanted.by.head(_protocol(self.group).number(wanted)), dtype=values.dtype)

    def _unchecked(self, values: Tensor) -> bool:
        """Reading a number on a GPU would wait for all that is queued there; compiled code cannot ask."""
        return torch.compiler.is_compiling() or not values.is_cpu


# The tensors of all ranks; the gradient of each is the sum of what the ranks did with it.
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor, ranks: Ranks, wanted: _Wanted) -> Tensor:
        ctx.ranks = ranks
        return ranks.exchanged(wanted, row)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor) -> tuple[Tensor, None, None]:
        total: Tensor = _Sum.apply(of_rows, ctx.ranks)
        return total[dist.get_rank(ctx.ranks.group)], None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sums(values)

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(of_sum, ctx.ranks), None
