"""Run batches through a model with only some layers in training mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

Forward = Callable[[nn.Module, Any], Any]  # (model, batch) -> output


def call_model(model: nn.Module, batch: Any) -> Any:
    """The model's output for `batch`: the input, a tuple or list that begins with it, or a mapping of arguments."""
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

    Dropout, for example, would change the variance. All modes are restored afterwards, also after an error.

    forward: called with model and batch, if `call_model` does not fit the model.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for layer in layers:
            layer.training = True  # not layer.train(): an activation module in it stays in evaluation mode
        with torch.no_grad():
            for batch in batches:
                (forward or call_model)(model, batch)
                after_batch()
    finally:
        for module, mode in modes.items():
            module.training = mode
