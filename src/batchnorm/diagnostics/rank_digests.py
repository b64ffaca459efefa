"""What the processes of a training have in their buffers, told without a collective call.

Where only some of them examine their model, a collective would wait for ever. Each writes a digest of its running
statistics into the store by which the processes have found each other, and reads those of the others that come in time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SECONDS = 10.0
_KEY = "batchnorm/examine"
_calls = [0]


def digests(layers: Mapping[str, Any]) -> dict[str, str]:
    """A digest of the running statistics of each layer, by path."""
    return {path: _digest(layer.running_mean, layer.running_var) for path, layer in layers.items()}


def of_all_ranks(layers: Mapping[str, Any]) -> list[dict[str, str]] | str:
    """The digests of each process, by rank; or why they are not known."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return "it needs several processes, each of which examines its model"
    store = dist.distributed_c10d._get_default_store()
    rank, number, begun = dist.get_rank(), dist.get_world_size(), time.time()
    _calls[0] += 1
    store.set(f"{_KEY}/{_calls[0]}/{rank}", json.dumps({"time": begun, "layers": digests(layers)}))
    found: list[dict[str, str]] = []
    for other in range(number):
        key = f"{_KEY}/{_calls[0]}/{other}"
        left = max(begun + _SECONDS - time.time(), 0.01)
        try:
            store.wait([key], timedelta(seconds=left))
        except (dist.DistStoreError, RuntimeError):
            return (
                f"process {other} did not examine its model within {_SECONDS:g} s: call examine on every rank"
            )
        told = json.loads(store.get(key))
        if abs(told["time"] - begun) > 10 * _SECONDS:  # an earlier call, which this process took no part in
            return f"process {other} examined its model at another time: call examine on every rank"
        found.append(told["layers"])
    return found


def _digest(*values: Tensor) -> str:
    """Of the bits of these numbers: their sum, each times a random one, modulo 2^64."""
    bits = torch.cat([each.detach().flatten().double().cpu() for each in values]).view(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, bits.shape, generator=generator) * 2 + 1
    return f"{int((bits * factors).sum()) % 2**64:016x}"
