"""What processes that train one model say to each other: how often, and how many bytes. Arithmetic, nothing is run.

Sync's exchanges are those of statistics/sync.py, for layers that are each called once a step, without a mask. The
others are DistributedDataParallel's with its defaults, as torch documents them: gradients in buckets that are
all-reduced, and, before each forward pass, the buffers of rank 0 for everyone.
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
    """One exchange between all ranks."""

    name: Name
    bytes: int  # of the tensor that each rank comes with

    def received(self, ranks: int) -> float:
        """Bytes that reach a rank; of a broadcast, one that is not its root.

        In a ring, as gloo does it, and NCCL with large tensors; fewer bytes are not possible (Patarasuk & Yuan 2009,
        "Bandwidth optimal all-reduce algorithms for clusters of workstations").
        """
        others = ranks - 1
        times = {"all_gather": others, "all_reduce": 2 * others / ranks, "broadcast": min(others, 1)}
        return times[self.name] * self.bytes


def received(collectives: Iterable[Collective], ranks: int) -> float:
    """Bytes that reach a rank in all of them."""
    return sum(each.received(ranks) for each in collectives)


def exchanges(model: nn.Module) -> list[Collective]:
    """What Sync in every BN layer of `model` adds to a training step, forward and backward."""
    channels = [_channels(layer) for layer in layers_of(model).values()]
    double = torch.float64.itemsize
    return [
        *(Collective("all_gather", (1 + 2 * each) * double) for each in channels),  # count, means, m2s
        *(Collective("all_reduce", 2 * each * double) for each in reversed(channels)),  # Σ g, Σ g·x̂
    ]


def gradients(model: nn.Module) -> list[Collective]:
    """DDP's exchanges of gradients in a step, those of the last layers first."""
    trained = [values for values in model.parameters() if values.requires_grad]
    return [Collective("all_reduce", size) for size in _buckets(trained[::-1], _GRADIENTS)]


def buffers(model: nn.Module) -> list[Collective]:
    """DDP's broadcasts before a step, running statistics mostly; broadcast_buffers=False does without."""
    return [Collective("broadcast", size) for size in _buckets(list(model.buffers()), _BUFFERS)]


def population(model: nn.Module) -> list[Collective]:
    """The exchange of population statistics after training, once: see calibrate/inference_copy.py."""
    values = sum(2 * _channels(layer) for layer in layers_of(model).values())
    return [Collective("all_reduce", values * torch.float64.itemsize)]


def _channels(layer: _BatchNorm) -> int:
    """Moments that the layer takes; where every activation is by itself, one for each."""
    features: int | tuple[int, ...] = layer.num_features
    return torch.Size([features] if isinstance(features, int) else features).numel()


def _buckets(tensors: Sequence[Tensor], limits: tuple[int, ...]) -> list[int]:
    """Bytes of each bucket: tensors of one dtype, in their order, until one reaches the limit; the last limit stays."""
    full: list[int] = []
    open_: dict[torch.dtype, int] = {}
    begun: dict[torch.dtype, int] = {}  # buckets that came before, of each dtype
    for each in tensors:
        size = open_.pop(each.dtype, 0) + each.numel() * each.element_size()
        number = begun.get(each.dtype, 0)
        if size >= limits[min(number, len(limits) - 1)]:
            full.append(size)
            begun[each.dtype] = number + 1
        else:
            open_[each.dtype] = size
    return full + list(open_.values())
