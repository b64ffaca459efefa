"""The path of a layer in its model, for messages: a layer does not know its name, but the modules that called it do."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn

_KNOWN = "_name_for_messages"


def forget_name(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a layer without its name: a copy may be called otherwise."""
    return {name: value for name, value in state.items() if name != _KNOWN}


def name_of(layer: nn.Module) -> str:
    """As qualified_name; looked for once, unless the layer stands alone."""
    if torch.compiler.is_compiling():
        return type(layer).__name__
    known: str | None = vars(layer).get(_KNOWN)
    if known is None:
        known = qualified_name(layer)
        if known.startswith("'"):
            vars(layer)[_KNOWN] = known
    return known


def qualified_name(layer: nn.Module) -> str:
    """The path of `layer` in the outermost module that is running now, and its repr; for messages only.

    A layer does not know its name, but the modules that called it stand on the call stack.
    """
    path = ""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module) and caller is not layer:
            path = next((name for name, module in caller.named_modules() if module is layer), path)
        frame = frame.f_back
    return f"{path!r}: {layer}" if path else str(layer)
