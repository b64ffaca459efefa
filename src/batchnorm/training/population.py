"""Algorithm 2, lines 8 to 11: what a trained network's BN normalises by when it is used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Model = TypeVar("Model", bound=nn.Module)


def inference_copy(
    model: Model, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] = nn.Module.__call__
) -> Model:
    """A copy of `model` in evaluation mode, its BN by the population statistics over `batches`.

    E[x] = E_B[mean_B] and Var[x] = E_B[count/(count - 1)·variance_B] over training batches of the same
    size: which is what running statistics with momentum=None become. Everything but BN is in evaluation
    mode meanwhile: dropout would add a variance of its own. Of several processes, each with batches of its own,
    all get the mean over all of them.

    forward: how the model sees a batch.
    """
    model = copy.deepcopy(model).eval()
    norms = _norms(model)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    if norms:
        with torch.no_grad():
            for batch in batches:
                forward(model, batch)
        average_over_processes(model)
    return model.eval()


def has_norms(model: nn.Module) -> bool:
    """Whether any layer of `model` keeps running statistics."""
    return bool(_norms(model))


def _norms(model: nn.Module) -> list[_NormBase]:
    return [module for module in model.modules() if isinstance(module, _NormBase)]


def average_over_processes(model: nn.Module) -> None:
    """Give the running statistics of `model`, in every process, their mean over all processes."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    buffers = [
        buffer
        for norm in _norms(model)
        for buffer in (norm.running_mean, norm.running_var)
        if buffer is not None
    ]
    mean_over_processes(buffers, torch.float64)


def mean_over_processes(tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Give `tensors`, in place and in every process, their mean over all processes: one exchange, in `dtype`."""
    joined = torch.cat([tensor.to(dtype).flatten() for tensor in tensors])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    for tensor, part in zip(tensors, joined.split([each.numel() for each in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
