"""A pass that fails leaves the model as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Give `model` back, should the block raise, what it had before: classes, attributes, children, buffers, hooks.

    Tensors are put back, not their values: a pass that writes into them has to do so last.
    """
    before = [(module, type(module), _attributes(module)) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, attributes in before:
            _restore(module, kind, attributes)
        for parameter, gradient in required:
            if parameter.requires_grad != gradient:  # of a lazy layer's it cannot be set
                parameter.requires_grad_(gradient)
        raise


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and what a dict, list or set among them holds."""
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
