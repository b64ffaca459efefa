"""Population statistics for inference: Algorithm 2, lines 8 to 11."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from batchnorm.calibrate.batches import Forward, run_batches
from batchnorm.calibrate.over_processes import mean_over_processes

Model = TypeVar("Model", bound=nn.Module)


def inference_copy(model: Model, batches: Iterable[Any], forward: Forward | None = None) -> Model:
    """A copy of `model` in evaluation mode, whose BN has the population statistics over `batches`.

    E[x] = E_B[mean_B] and Var[x] = E_B[count/(count - 1)·variance_B] over training batches of the same
    size, which are the running statistics with momentum=None. Everything but BN is in evaluation mode
    meanwhile, since dropout would change the variance. With several processes, each with its own batches,
    all get the mean over all of them.

    forward: called with model and batch, if `call_model` does not fit the model.
    """
    model = copy.deepcopy(model).eval()
    norms = _norms(model)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    if norms:
        run_batches(model, batches, norms, forward)
        average_over_processes(model)
    return model


def has_norms(model: nn.Module) -> bool:
    """Whether any layer of `model` keeps running statistics."""
    return bool(_norms(model))


def average_over_processes(model: nn.Module) -> None:
    """Replace the running statistics of `model` by their mean over all processes."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    buffers = [
        buffer
        for norm in _norms(model)
        for buffer in (norm.running_mean, norm.running_var)
        if buffer is not None
    ]
    mean_over_processes(buffers, torch.float64)


def _norms(model: nn.Module) -> list[_NormBase]:
    return [module for module in model.modules() if isinstance(module, _NormBase)]
