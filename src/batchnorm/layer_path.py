"""The path of a layer in its model, for error messages; found on the call stack, among the modules that call it."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn

_CACHED_NAME = "_name_for_messages"


def forget_name(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a layer without its cached name, as a copy may have another name."""
    return {name: value for name, value in state.items() if name != _CACHED_NAME}


def name_of(layer: nn.Module) -> str:
    """`qualified_name`, cached if the layer is part of a module."""
    if torch.compiler.is_compiling():
        return type(layer).__name__
    known: str | None = vars(layer).get(_CACHED_NAME)
    if known is None:
        known = qualified_name(layer)
        if known.startswith("'"):
            vars(layer)[_CACHED_NAME] = known
    return known


def qualified_name(layer: nn.Module) -> str:
    """The path of `layer` in the outermost module on the call stack, and its repr; for messages only."""
    path = ""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module) and caller is not layer:
            path = next((name for name, module in caller.named_modules() if module is layer), path)
        frame = frame.f_back
    return f"{path!r}: {layer}" if path else str(layer)
