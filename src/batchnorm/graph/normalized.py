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


def normalize(module: nn.Module, layer: nn.Module, of_input: bool, dim: int, rank: int) -> None:
    """Put `layer` into `module`, which has no `obstacle`: over its output or input.

    dim: in which its channels are, 1 or -1.
    rank: how many dimensions it has; one less without a dimension of the batch.
    """
    module.add_module(NORM, layer)
    kind: Any = type(module)
    module.__class__ = _subclass(kind, of_input, dim, rank if dim == 1 else 0)


def _apply(layer: Any, x: Any, dim: int, rank: int) -> Any:
    """The layer over a tensor whose channels are in dimension 1 or -1."""
    if dim == 1:
        if isinstance(x, Tensor) and x.dim() == rank - 1:  # a proxy of torch.fx stands for a batch
            return layer(x.unsqueeze(0)).squeeze(0)
        return layer(x)
    if x.dim() == 2:
        return layer(x)
    return layer(x.reshape(-1, x.shape[-1])).view(x.shape)


@functools.cache  # modules of one class have one class afterwards, too
def _subclass(base: Any, of_input: bool, dim: int, rank: int) -> type[nn.Module]:
    old = base.forward

    @functools.wraps(old)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not of_input:
            return _apply(self.norm, old(self, *args, **kwargs), dim, rank)
        if args:
            return old(self, _apply(self.norm, args[0], dim, rank), *args[1:], **kwargs)
        (name, x), *others = kwargs.items()
        return old(self, **{name: _apply(self.norm, x, dim, rank)}, **dict(others))

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = object.__reduce_ex__(self, max(int(protocol), 2))
        constructor, (kind, *rest), *state = reduced
        assert constructor is copyreg.__newobj__ and kind is type(self)  # type: ignore[attr-defined]
        return _reconstruct, (base, of_input, dim, rank, *rest), *state

    names = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), names)


def _reconstruct(base: Any, of_input: bool, dim: int, rank: int, *arguments: Any) -> nn.Module:
    kind = _subclass(base, of_input, dim, rank)
    return kind.__new__(kind, *arguments)
