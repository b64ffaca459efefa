"""The collectives of distributed training, their number and bytes, computed without running anything.

Sync's collectives are those of statistics/process_group.py, for layers that are called once per step without a mask, in
a step that repeats the one before. The others are those of DistributedDataParallel with its defaults, as torch
documents them: gradients are all-reduced in buckets, and the buffers of rank 0 are broadcast before each forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.graph.modules import layers_of

Name = Literal["all_gather", "all_reduce", "broadcast"]

_MIB = 2**20
_GRADIENTS = (_MIB, 25 * _MIB)  # bytes at which a bucket is full, the first and all later ones
_BUFFERS = (250 * _MIB,)


class Collective(NamedTuple):
    """A collective operation of all ranks."""

    name: Name
    bytes: int  # of each rank's input tensor

    def received_bytes(self, ranks: int) -> float:
        """The bytes that a rank receives; for a broadcast, a rank other than the root.

        In a ring, which gloo uses, and NCCL for large tensors; this is the minimum (Patarasuk & Yuan 2009,
        "Bandwidth optimal all-reduce algorithms for clusters of workstations").
        """
        others = ranks - 1
        times = {"all_gather": others, "all_reduce": 2 * others / ranks, "broadcast": min(others, 1)}
        return times[self.name] * self.bytes


def received_bytes(collectives: Iterable[Collective], ranks: int) -> float:
    """The bytes that a rank receives in all `collectives`."""
    return sum(collective.received_bytes(ranks) for collective in collectives)


def exchanges(model: nn.Module) -> list[Collective]:
    """The collectives of Sync in a training step, forward and backward, if every BN layer of `model` has it."""
    channels = [_channels(layer) for layer in layers_of(model).values()]
    double = torch.float64.itemsize
    return [
        *(Collective("all_gather", (2 + 2 * each) * double) for each in channels),  # what, count, means, m2s
        *(
            Collective("all_reduce", (2 + 2 * each) * double) for each in reversed(channels)
        ),  # what, Σ g, Σ g·x̂
    ]


def gradients(model: nn.Module) -> list[Collective]:
    """DDP's all_reduces of gradients in a step, the last layers first."""
    trained = [values for values in model.parameters() if values.requires_grad]
    return [Collective("all_reduce", size) for size in _buckets(trained[::-1], _GRADIENTS)]


def buffers(model: nn.Module) -> list[Collective]:
    """DDP's broadcasts of buffers, mostly running statistics, before a step; none with broadcast_buffers=False."""
    return [Collective("broadcast", size) for size in _buckets(list(model.buffers()), _BUFFERS)]


def population(model: nn.Module) -> list[Collective]:
    """The all_gather of population statistics, see passes/estimate.py."""
    values = sum(3 + 6 * _channels(layer) for layer in layers_of(model).values())
    return [Collective("all_gather", values * torch.float64.itemsize)]


def _channels(layer: _BatchNorm) -> int:
    """The number of moments of the layer: of channels, or of activations with num_features=(C, *S)."""
    features: int | tuple[int, ...] = layer.num_features
    return torch.Size([features] if isinstance(features, int) else features).numel()


def _buckets(tensors: Sequence[Tensor], limits: tuple[int, ...]) -> list[int]:
    """The bytes of each bucket: tensors of one dtype, in order, until the limit; the last limit holds for the rest."""
    full: list[int] = []
    pending: dict[torch.dtype, int] = {}  # bytes of the unfinished bucket of each dtype
    finished: dict[torch.dtype, int] = {}  # number of full buckets of each dtype
    for each in tensors:
        size = pending.pop(each.dtype, 0) + each.numel() * each.element_size()
        number = finished.get(each.dtype, 0)
        if size >= limits[min(number, len(limits) - 1)]:
            full.append(size)
            finished[each.dtype] = number + 1
        else:
            pending[each.dtype] = size
    return full + list(pending.values())
