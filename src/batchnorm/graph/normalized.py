"""Let a module normalise what it returns, or what it is given, by changing its class to a subclass of it.

The layer is its child `norm`. The module stays the same object with the same parameters under the same names, so that
weights, optimizers, and a forward that reads its attributes find what they found before.
"""

from __future__ import annotations

import copyreg
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from batchnorm.graph.modules import is_patched

NORM = "norm"


def obstacle(module: nn.Module) -> str | None:
    """Why no layer can be put into `module`, or None."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit"
    if any(isinstance(each, nn.UninitializedParameter) for each in module._parameters.values()):
        return "is lazy: run a batch through the model first"
    if parametrize.is_parametrized(module):
        return "has parametrizations (weight_norm, spectral_norm, ...): remove them first"
    if module._forward_hooks or module._backward_hooks:
        return "has hooks, which would see its normalised output"
    if is_patched(module):
        return "its forward was replaced on the instance"
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return f"is a {kind.__name__}, whose children are called by their order or name"
    if hasattr(module, NORM):
        return f"has an attribute {NORM} of its own"
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return f"{kind.__name__} defines its own __reduce__"
    return None


def normalize(module: nn.Module, layer: nn.Module, of_input: bool, dim: int) -> None:
    """Put `layer` into `module`, which has no `obstacle`: over its output or input, whose channels are in `dim`."""
    module.add_module(NORM, layer)
    kind: Any = type(module)
    module.__class__ = _subclass(kind, of_input, dim)


def _apply(layer: Any, x: Tensor, dim: int) -> Tensor:
    """The layer over a tensor whose channels are in dimension 1 or -1."""
    if dim == 1 or x.dim() == 2:
        return layer(x)  # type: ignore[no-any-return]
    return layer(x.flatten(0, -2)).view(x.shape)  # type: ignore[no-any-return]


@functools.cache  # modules of one class have one class afterwards, too
def _subclass(base: Any, of_input: bool, dim: int) -> type[nn.Module]:
    old = base.forward

    @functools.wraps(old)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not of_input:
            return _apply(self.norm, old(self, *args, **kwargs), dim)
        if args:
            return old(self, _apply(self.norm, args[0], dim), *args[1:], **kwargs)
        (name, x), *others = kwargs.items()
        return old(self, **{name: _apply(self.norm, x, dim)}, **dict(others))

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = object.__reduce_ex__(self, max(int(protocol), 2))
        constructor, (kind, *rest), *state = reduced
        assert constructor is copyreg.__newobj__ and kind is type(self)  # type: ignore[attr-defined]
        return _reconstruct, (base, of_input, dim, *rest), *state

    names = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), names)


def _reconstruct(base: Any, of_input: bool, dim: int, *arguments: Any) -> nn.Module:
    kind = _subclass(base, of_input, dim)
    return kind.__new__(kind, *arguments)
