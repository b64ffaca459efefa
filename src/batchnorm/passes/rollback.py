"""Restore a model: when a pass fails, or after a look at it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """If the block raises, restore the classes, attributes, children, buffers and hooks of `model`.

    The tensors are restored, but not their values: a pass that writes into tensors must do so last.
    """
    put_back = _taken(model)
    try:
        yield
    except BaseException:
        put_back()
        raise


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """The same in any case: what the block does to the model is undone at its end."""
    put_back = _taken(model)
    try:
        yield
    finally:
        put_back()


def _taken(model: nn.Module) -> Callable[[], None]:
    """What makes the model what it is now."""
    before = [(module, type(module), _attributes(module)) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back() -> None:
        for module, kind, attributes in before:
            _restore(module, kind, attributes)
        for parameter, gradient in required:
            if (
                parameter.requires_grad != gradient
            ):  # only if it differs: it cannot be set for lazy parameters
                parameter.requires_grad_(gradient)

    return put_back


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and for a dict, list or set a copy of its contents."""
    return {
        name: (value, value.copy() if type(value) in _CONTAINERS else None)
        for name, value in vars(module).items()
    }


def _restore(module: nn.Module, kind: type[nn.Module], attributes: dict[str, tuple[Any, Any]]) -> None:
    module.__class__ = kind
    now = vars(module)
    now.clear()
    for name, (value, content) in attributes.items():
        if content is not None:
            value.clear()
            getattr(value, "extend" if isinstance(value, list) else "update")(content)
        now[name] = value
    if isinstance(module, fx.GraphModule):
        module.recompile()
