"""A layer with Sync, the same without, and the exchanges alone: the contenders of each rank."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist

from batchnorm.bench.cold import Ring, counts, passes
from batchnorm.bench.rounds import Contender, Sample
from batchnorm.layers import BatchNorm
from batchnorm.statistics import Sync

TURNS = 9


def calls(shape: tuple[int, ...]) -> int:
    """Few in a sample: a system that stalls one of the processes now and then would do so in every longer one."""
    return 1 if math.prod(shape) > 10**6 else 8


def contenders(shape: tuple[int, ...], quick: bool) -> Mapping[str, Contender]:
    """Of one rank, which has a batch of that shape: "sync", "plain" and "collectives"."""
    seed = torch.randn(shape)
    count = calls(shape)
    cold = max(count, counts(seed, quick)[1])
    inputs = Ring([seed.clone().requires_grad_() for _ in range(cold)], count)
    gradients = [seed.clone() for _ in range(count)]
    layers = {"sync": BatchNorm(shape[1], statistics=Sync()), "plain": BatchNorm(shape[1])}
    found = {who: passes(layer, layer, inputs, [], gradients) for who, layer in layers.items()}
    return {**found, "collectives": partial(_collectives, shape[1], count)}


def _collectives(channels: int, calls: int) -> Sample:
    """What Sync cannot do without, alone: the exchange of each pass, of as many bytes."""
    row, sums = (
        torch.zeros(1 + 2 * channels, dtype=torch.float64),
        torch.zeros(2, channels, dtype=torch.float64),
    )
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    start = time.perf_counter()
    for _ in range(calls):
        dist.all_gather(rows, row)
    middle = time.perf_counter()
    for _ in range(calls):
        dist.all_reduce(sums)
    end = time.perf_counter()
    return {"forward": (middle - start) / calls, "backward": (end - middle) / calls}
