"""A block that leaves a model, its gradients and the generators of random numbers as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from batchnorm.passes.rollback import restored


@contextmanager
def intact(model: nn.Module) -> Iterator[None]:
    """Restore at the end, also after an error: modes, attributes, hooks, buffers, gradients, random numbers.

    Generators are torch's, of the CPU and of CUDA devices, numpy's global one and Python's.
    """
    buffers = [(each, each.clone()) for each in model.buffers()]
    gradients = [(each, each.grad, _copy(each.grad)) for each in model.parameters()]
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)), restored(model):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None and numpy_state is not None:
                numpy.random.set_state(numpy_state)
            for module, training in modes:
                if module.training != training:  # of scripted modules no attribute of Python
                    module.training = training
            with torch.no_grad():
                for buffer, values in buffers:
                    if not _equal(buffer, values):
                        buffer.copy_(values)
                for parameter, gradient, kept in gradients:
                    if gradient is not None and kept is not None and not _equal(gradient, kept):
                        gradient.copy_(kept)
                    parameter.grad = gradient


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one == other
    if one.is_floating_point():
        same |= one.isnan() & other.isnan()
    return bool(same.all())
