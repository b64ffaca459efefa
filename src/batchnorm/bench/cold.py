"""Layers on cold inputs, and a copy between cold buffers as the unit of time.

Inputs come from a ring of more than 300 MB, so that none is in a cache, and a sample runs all its forward passes
before its backward passes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from batchnorm.bench.rounds import Candidate, Sample

Operation = Callable[..., Tensor]  # of x, and of the residual if there is one

_COLD = 300 * 10**6  # bytes of inputs in the ring, several times any cache
_SAMPLE = 128 * 10**6  # bytes of inputs in a sample
_CALLS = 256  # largest number of calls in a sample
_QUICK_COLD = 10**4


def counts(seed: Tensor, quick: bool) -> tuple[int, int]:
    """The number of calls in a sample, and of inputs like `seed` in the ring."""
    size = seed.numel() * seed.element_size()
    calls = 3 if quick else max(min(-(-_SAMPLE // size), _CALLS), 2)
    return calls, max(-(-(_QUICK_COLD if quick else _COLD) // size), calls)


class Ring:
    """A ring of tensors: `take` returns the next `count`."""

    def __init__(self, tensors: list[Tensor], count: int) -> None:
        self._tensors, self._count = deque(tensors), count

    def take(self) -> list[Tensor]:
        batch_inputs = [self._tensors[number] for number in range(self._count)]
        self._tensors.rotate(-self._count)
        return batch_inputs


def now(x: Tensor) -> float:
    """The time at which all that is queued on the device of `x` is done, in seconds."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def passes(
    operation: Operation,
    layer: nn.Module,
    inputs: Ring,
    residuals: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> Candidate:
    """A candidate that calls `operation`, then computes the gradients of its inputs and of the layer's parameters."""
    parameters = [values for values in layer.parameters() if values.requires_grad]

    def sample() -> Sample:
        batch_inputs = inputs.take()
        arguments = (
            list(zip(batch_inputs, residuals, strict=True)) if residuals else [(x,) for x in batch_inputs]
        )
        start = now(batch_inputs[0])
        outputs = deque(operation(*tensors) for tensors in arguments)
        middle = now(batch_inputs[0])
        for tensors, dy in zip(arguments, gradients, strict=True):
            # popleft: the output is freed with its graph, as in a training step
            torch.autograd.grad(outputs.popleft(), [*tensors, *parameters], dy)
        end = now(batch_inputs[0])
        return {"forward": (middle - start) / len(arguments), "backward": (end - middle) / len(arguments)}

    return sample


def evaluations(operation: Operation, inputs: Ring) -> Candidate:
    """A candidate that calls `operation` in inference mode."""

    def sample() -> Sample:
        batch_inputs = inputs.take()
        with torch.inference_mode():
            start = now(batch_inputs[0])
            outputs = [operation(x) for x in batch_inputs]
            end = now(batch_inputs[0])
        del outputs  # only now: memory freed between calls would be warm
        return {"evaluation": (end - start) / len(batch_inputs)}

    return sample


def copies(inputs: Ring, targets: Sequence[Tensor]) -> Candidate:
    """The candidate "copy": y.copy_(x)."""

    def sample() -> Sample:
        batch_inputs = inputs.take()
        with torch.no_grad():
            start = now(batch_inputs[0])
            for x, y in zip(batch_inputs, targets, strict=True):
                y.copy_(x)
            end = now(batch_inputs[0])
        return {"copy": (end - start) / len(batch_inputs)}

    return sample
