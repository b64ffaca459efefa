"""Predicates on modules: normalization layers, hooks, patched forwards, activations."""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from batchnorm.kernels.call import Activation
from batchnorm.layers import _BatchNorm

_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NAMED = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}
_MODULES: dict[str, type[nn.Module]] = {
    **{name: kind for kind, name in _NAMED.items()},
    "leaky_relu": nn.LeakyReLU,
    "relu6": nn.ReLU6,
}


def is_ours(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether `module` does what our layers do: a subclass with a forward of its own may do anything."""
    return isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward


def is_normalization(module: nn.Module) -> bool:
    """Whether `module` is a batch normalization of any library, and so has a line in reports."""
    name = str(
        getattr(module, "original_name", type(module).__name__)
    )  # of a scripted module, the class name
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in name


def has_statistics(module: nn.Module) -> bool:
    """Whether `module` has buffers of running statistics, of whatever class it is."""
    buffers = dict(module.named_buffers(recurse=False))
    return all(isinstance(buffers.get(name), Tensor) for name in ("running_mean", "running_var"))


def normalizes(module: nn.Module) -> bool:
    """Whether `module` normalizes, by a name or by running statistics, and so has a line in a report on all classes."""
    return is_normalization(module) or has_statistics(module)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a normalization of any kind and library: LayerNorm2d, GroupNormAct, FrozenBatchNorm2d.

    One with an activation in it is; a block with a convolution is not, nor a layer of normalised weights, nor local
    response normalization, which has no parameters and no statistics.
    """
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.LocalResponseNorm, nn.CrossMapLRN2d)):
        return False
    by_name = "Norm" in type(module).__name__ and not module._modules.keys() - {"act", "drop"}
    return isinstance(module, _NORMS) or normalizes(module) or by_name


def keeps_statistics(model: nn.Module) -> bool:
    """Whether any layer of `model` keeps running statistics."""
    return any(map(has_statistics, model.modules()))


def refuse_lazy(model: nn.Module) -> None:
    """Raise ValueError, with its path, for a layer that does not know its size yet."""
    uninitialized = (nn.UninitializedParameter, nn.UninitializedBuffer)
    for path, module in model.named_modules():
        own = (*module._parameters.values(), *module._buffers.values())
        if any(isinstance(each, uninitialized) for each in own):
            raise ValueError(f"{path or 'the model'} is lazy: run a batch through the model first")


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made `module`, or was told to compile it: its children are then not called."""
    return isinstance(module, torch._dynamo.OptimizedModule) or bool(vars(module).get("_compiled_call_impl"))


def is_patched(module: nn.Module) -> bool:
    """Whether `forward` or `_call_impl` was replaced on the instance."""
    return "forward" in vars(module) or "_call_impl" in vars(module)


def layers_of(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The batch normalization layers of `model`, torch's and ours, by path; a shared layer is listed once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }


def activation_of(module: nn.Module) -> Activation:
    """The value of `activation=` that is equivalent to `module`, or None if no kernel supports it."""
    if is_patched(module):
        return None
    match module:
        case nn.Hardtanh(min_val=0.0, max_val=6.0) if type(module) in (nn.Hardtanh, nn.ReLU6):
            return "relu6"
        case nn.LeakyReLU(negative_slope=slope) if type(module) is nn.LeakyReLU:
            return leaky_relu(slope)
    return _NAMED.get(type(module))


def leaky_relu(slope: float) -> Activation:
    return "leaky_relu" if slope == 0.01 else nn.LeakyReLU(slope)


def module_of(activation: Activation) -> nn.Module | None:
    """A module that is equivalent to `activation`, or None for a function."""
    if isinstance(activation, nn.Module):
        return activation
    return _MODULES[activation]() if isinstance(activation, str) else None


class InPlaceOfLayer(nn.Module):
    """What takes the place of a layer of ours, and is called as it was: with an activation, and with a residual."""

    activation: Activation


class Fused(NamedTuple):
    """An activation that was fused into a layer, kept at its place for the way back."""

    module: nn.Module
    layer: _BatchNorm
    activation: Activation  # of the layer, as long as this holds


def stand_in(fused: Fused) -> nn.Identity:
    """An Identity for the place of an activation that is fused."""
    identity = nn.Identity().train(fused.module.training)
    vars(identity)["fused"] = fused  # not as a child: it is not called
    return identity


def fused_at(module: nn.Module) -> Fused | None:
    """What stood in the place of `module` before it was fused, if `module` is its stand_in."""
    return vars(module).get("fused") if type(module) is nn.Identity else None
