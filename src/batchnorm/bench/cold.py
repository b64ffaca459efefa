"""Layers on cold inputs, and a copy between such buffers, by which their time is measured.

Inputs come from a ring of more than 300 MB, so that nobody finds them in a cache, and a sample runs all its forward
passes before its backward passes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from batchnorm.bench.rounds import Contender, Sample

Operation = Callable[..., Tensor]  # of x, and of the residual if there is one

_COLD = 300 * 10**6  # bytes of inputs, several times any cache
_SAMPLE = 128 * 10**6  # bytes of inputs in a sample
_CALLS = 256  # and no more calls than that
_QUICK_COLD = 10**4


def counts(seed: Tensor, quick: bool) -> tuple[int, int]:
    """How many calls a sample has, and how many inputs like `seed` a ring."""
    size = seed.numel() * seed.element_size()
    calls = 3 if quick else max(min(-(-_SAMPLE // size), _CALLS), 2)
    return calls, max(-(-(_QUICK_COLD if quick else _COLD) // size), calls)


class Ring:
    """Tensors handed out in turn, `count` at a time."""

    def __init__(self, tensors: list[Tensor], count: int) -> None:
        self._tensors, self._count = deque(tensors), count

    def take(self) -> list[Tensor]:
        taken = [self._tensors[number] for number in range(self._count)]
        self._tensors.rotate(-self._count)
        return taken


def passes(
    operation: Operation,
    layer: nn.Module,
    inputs: Ring,
    residuals: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> Contender:
    """A contender that calls `operation`, then asks for the gradients of its inputs and of the layer's parameters."""
    parameters = [values for values in layer.parameters() if values.requires_grad]

    def sample() -> Sample:
        taken = inputs.take()
        arguments = list(zip(taken, residuals, strict=True)) if residuals else [(x,) for x in taken]
        start = time.perf_counter()
        outputs = deque(operation(*tensors) for tensors in arguments)
        middle = time.perf_counter()
        for tensors, dy in zip(arguments, gradients, strict=True):
            # the output goes with its graph, as in a training step
            torch.autograd.grad(outputs.popleft(), [*tensors, *parameters], dy)
        end = time.perf_counter()
        return {"forward": (middle - start) / len(arguments), "backward": (end - middle) / len(arguments)}

    return sample


def evaluations(operation: Operation, inputs: Ring) -> Contender:
    """A contender that calls `operation` where nobody asks for gradients."""

    def sample() -> Sample:
        taken = inputs.take()
        with torch.inference_mode():
            start = time.perf_counter()
            outputs = [operation(x) for x in taken]
            end = time.perf_counter()
        del outputs  # only now: memory that was just freed would be warm
        return {"evaluation": (end - start) / len(taken)}

    return sample


def copies(inputs: Ring, targets: Sequence[Tensor]) -> Contender:
    """The contender that copies."""

    def sample() -> Sample:
        taken = inputs.take()
        with torch.no_grad():
            start = time.perf_counter()
            for x, y in zip(taken, targets, strict=True):
                y.copy_(x)
            end = time.perf_counter()
        return {"copy": (end - start) / len(taken)}

    return sample
