"""The candidates of each rank: a layer with Sync, the same layer without, and the collectives alone."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist

from batchnorm.bench.cold import Ring, counts, passes
from batchnorm.bench.rounds import Candidate, Sample
from batchnorm.layers import BatchNorm
from batchnorm.statistics import Sync

TURNS = 9


def calls(shape: tuple[int, ...]) -> int:
    """The number of calls in a sample: few, as the scheduler would stall some process in every longer sample."""
    return 1 if math.prod(shape) > 10**6 else 8


def candidates(shape: tuple[int, ...], quick: bool) -> Mapping[str, Candidate]:
    """The candidates "sync", "plain" and "collectives" of one rank, which has a batch of `shape`."""
    seed = torch.randn(shape)
    count = calls(shape)
    cold = max(count, counts(seed, quick)[1])
    inputs = Ring([seed.clone().requires_grad_() for _ in range(cold)], count)
    gradients = [seed.clone() for _ in range(count)]
    layers = {"sync": BatchNorm(shape[1], statistics=Sync()), "plain": BatchNorm(shape[1])}
    found = {name: passes(layer, layer, inputs, [], gradients) for name, layer in layers.items()}
    return {**found, "collectives": partial(_collectives, shape[1], count)}


def _collectives(channels: int, calls: int) -> Sample:
    """The collectives of Sync's forward and backward pass alone, with the same number of bytes."""
    moments = torch.zeros(1 + 2 * channels, dtype=torch.float64)
    sums = torch.zeros(2, channels, dtype=torch.float64)
    gathered = [torch.empty_like(moments) for _ in range(dist.get_world_size())]
    start = time.perf_counter()
    for _ in range(calls):
        dist.all_gather(gathered, moments)
    middle = time.perf_counter()
    for _ in range(calls):
        dist.all_reduce(sums)
    end = time.perf_counter()
    return {"forward": (middle - start) / calls, "backward": (end - middle) / calls}
