"""How a batch of a loader is handed to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Forward = Callable[[nn.Module, Any], Any]  # of a model and one of its batches


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for `batch`: a mapping holds arguments by name, of a tuple or list the first is the input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    return model(batch)
