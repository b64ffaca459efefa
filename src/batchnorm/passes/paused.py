"""Forward passes that leave running statistics as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from batchnorm.graph.modules import is_ours, layers_of
from batchnorm.layers import _BatchNorm


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Let every batch normalization of `model` normalise as it does, and move no running statistics.

    For a forward pass whose input is none of the data: the second step of SAM (Foret et al. 2021), adversarial
    directions (Miyato et al. 2018), warming up a CUDA graph, measuring a loss in training mode. Modes stay as they are:
    a layer in training normalises by its batch, one in evaluation or frozen by its running statistics. Nothing is added
    to the state_dict, and nothing stays behind.

    Args:
        model: with layers of torch's, of libraries that derive from them, or ours; a layer by itself is one too.

    Yields: None.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> before = model[1].running_mean.clone()
        >>> with bn.paused(model):
        ...     y = model(torch.randn(16, 4))
        >>> bool((model[1].running_mean == before).all()), int(model[1].num_batches_tracked)
        (True, 0)
    """
    layers = list(layers_of(model).values())
    settings = [
        (layer, {name: vars(layer)[name] for name in _SETTINGS if name in vars(layer)}) for layer in layers
    ]
    # a forward of somebody's own may ask neither
    buffers = [
        (each, each.clone())
        for layer in layers
        if not is_ours(layer)
        for each in layer.buffers(recurse=False)
    ]
    try:
        for layer in layers:
            if isinstance(layer, _BatchNorm):
                layer.follows = False
            else:
                layer.track_running_stats = False  # in training it has no running statistics then
        yield
    finally:
        for layer, values in settings:
            vars(layer).pop("follows", None)
            vars(layer).update(values)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


_SETTINGS = ("track_running_stats", "follows")
