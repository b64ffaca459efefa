"""Batches through a model of which only chosen layers are in training mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

Forward = Callable[[nn.Module, Any], Any]  # of a model and one of its batches


def call_model(model: nn.Module, batch: Any) -> Any:
    """The model's output for `batch`: a mapping holds arguments by name, of a tuple or list the first is the input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    return model(batch)


def run_batches(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Iterable[nn.Module],
    forward: Forward | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> None:
    """Run `batches` through `model` without gradients, `layers` in training mode and the rest in evaluation mode.

    Dropout, for one, would add a variance of its own. Afterwards, after an error too, every mode is as before.

    forward: called with model and batch, where that is not how the model is called.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for layer in layers:
            layer.training = True  # of the layer alone: an activation in it stays in evaluation mode
        with torch.no_grad():
            for batch in batches:
                (forward or call_model)(model, batch)
                after_batch()
    finally:
        for module, mode in modes.items():
            module.training = mode
