"""The path of a layer in its model, for error messages; found on the call stack, among the modules that call it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

_CACHED_NAME = "_name_for_messages"


def forget_name(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a layer without its cached name, as a copy may have another name."""
    return {name: value for name, value in state.items() if name != _CACHED_NAME}


class Name(NamedTuple):
    """What a layer is called."""

    path: str
    description: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (repr(self.path) if self.path else "", self.description)))


def name_of(layer: nn.Module) -> Name:
    """As `qualified_name`; but a layer that is no module's is called by the variable that holds it. Cached."""
    if torch.compiler.is_compiling():
        return Name("", type(layer).__name__)
    known: Name | None = vars(layer).get(_CACHED_NAME)
    if known is None:
        known = Name(_path(layer) or _variable(layer), str(layer))
        if known.path:
            vars(layer)[_CACHED_NAME] = known
    return known


def qualified_name(layer: nn.Module) -> str:
    """The path of `layer` in the outermost module on the call stack, and its repr; for messages only."""
    return str(Name(_path(layer), str(layer)))


def _path(layer: nn.Module) -> str:
    path = ""
    for variables in _frames():
        caller = variables.get("self")
        if isinstance(caller, nn.Module) and caller is not layer:
            path = _path_in(caller, layer) or path
    return path


def _variable(layer: nn.Module) -> str:
    """The path in a module, the place in a list or the name that the outermost function knows `layer` by."""
    found = ""
    for variables in _frames():
        values = [(name, value) for name, value in list(variables.items()) if name != "self"]
        modules = (value for _, value in values if isinstance(value, nn.Module) and value is not layer)
        found = (
            next(filter(None, (_path_in(module, layer) for module in modules)), "")
            or next((f"{name}[{place}]" for name, value in values for place in _places(value, layer)), "")
            or next((name for name, value in values if value is layer), found)
        )
    return found


def _frames() -> Iterator[Mapping[str, Any]]:
    """The variables of each function on the call stack, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back


def _path_in(module: nn.Module, layer: nn.Module) -> str:
    return next((name for name, each in module.named_modules() if each is layer), "")


def _places(value: object, layer: nn.Module) -> Iterator[str]:
    items: Iterable[tuple[object, object]] = ()
    if type(value) in (list, tuple):
        items = enumerate(cast(Sequence[object], value))
    elif type(value) is dict:
        items = list(cast(dict[object, object], value).items())
    return (repr(place) for place, each in items if each is layer)
