"""The memory of a training step: what a forward pass saves for the backward pass, and the peak of the whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from batchnorm.kernels import recipes


def saved_bytes(forward: Callable[[], object], apart_from: Iterable[Tensor] = ()) -> int:
    """The bytes of the storages that autograd saves in `forward()`, each once, as bn.save_memory leaves them.

    apart_from: tensors that are there anyway, such as the parameters.
    """
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    found: list[recipes.Saved] = []
    with saved_tensors_hooks(pack, lambda tensor: tensor), recipes.watched(found):
        output = forward()  # holds the graph
    kept += [saved.tensor for saved in found if saved.tensor is not None]
    anyway = recipes.storages(apart_from)
    total = sum(size for storage, size in recipes.storages(kept).items() if storage not in anyway)
    del output
    return total


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """How far the memory that torch allocates rises above where it is, in `step()`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max((level for _, level in levels(step)), default=0)


def levels(step: Callable[[], object]) -> list[tuple[int, int]]:
    """The memory that torch has allocated on the CPU, above where it was, over `step()`: nanoseconds and bytes."""
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "6"
    )  # or the profiler writes to stderr; it asks when it is first used
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    found, level = [], 0
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        found.append((event.start_ns(), level))
    return found
