"""What a call of a normalization layer does in evaluation: it multiplies and shifts each channel."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.graph.linear import normalizes_by_constants
from batchnorm.graph.modules import InPlaceOfLayer, has_hooks, is_ours
from batchnorm.graph.observation import BATCH_NORM, LAYOUT, ModuleCall, Operation, Value, behind_layout
from batchnorm.graph.sources import GetTensor
from batchnorm.kernels.call import Activation
from batchnorm.kernels.reference import activate
from batchnorm.moments import Affine, channelwise

_SAME = 1e-12


class Left(Exception):
    """A layer that cannot be folded; the message says why."""


@dataclass(frozen=True, eq=False)
class Normalization:
    """A call of a layer.

    value: what it normalizes, (N, C, ...).
    output: what comes of that; None if it does more to it in the same operation.
    affine: the factor and the term of each channel, (C,) float64; of each activation, (C, *S), where a layer has these.
    """

    call: ModuleCall
    value: Value
    output: Value | None
    affine: Affine

    def check_channels(self) -> None:
        """Raise Left unless there is one factor for each channel."""
        if self.affine.scale.dim() != 1:
            raise Left("has statistics of each activation")

    @property
    def path(self) -> str:
        return self.call.path

    @classmethod
    def of(cls, call: ModuleCall, tensor: GetTensor) -> Normalization:
        """What this call does. Raises: Left."""
        module = call.module
        if isinstance(module, torch.jit.ScriptModule):
            raise Left("is compiled by torch.jit")
        if is_ours(module):
            given = call.given or call.reads  # by position, or else by name
            if any(not value.dtype.is_floating_point for value in call.reads):
                raise Left("takes a mask")
            if not call.given and len(call.reads) > 1:
                raise Left("takes its input by name, beside others")
            alone = module.activation is None and len(call.reads) == 1
            return cls(call, given[0], call.returns[0] if alone else None, _affine_of_ours(module))
        if not _forward_is_known(module):
            return cls._of_any(call)
        operations = [operation for operation in call.operations if operation.name in BATCH_NORM]
        if not operations and not all(math.prod(value.shape) for value in call.given):
            raise Left("is called without any values")
        if len(operations) != 1:
            raise Left(f"is {type(module).__name__}, which normalizes {len(operations)} times in a call")
        (made,) = operations
        return cls(call, made.reads[0], made.results[0], _affine(made, tensor))

    @classmethod
    def _of_any(cls, call: ModuleCall) -> Normalization:
        """Of a layer of any class: what it is called with shows what it does."""
        kind = type(call.module).__name__
        inputs = call.given or call.reads
        shapes = [value.shape for value in (*inputs, *call.returns)]
        if len(shapes) != 2 or shapes[0] != shapes[1] or len(shapes[0]) < 2:
            raise Left(f"is {kind}, which takes or returns more than one tensor")
        _check_operations(call, inputs[0])
        return cls(call, inputs[0], call.returns[0], _seen_affine(call.module, shapes[0]))


def rest_of(module: nn.Module) -> nn.Module:
    """What a layer does after it has normalized: what takes its place. Raises: Left."""
    if has_hooks(module):
        raise Left("has hooks, which see its output")
    if is_ours(module):
        return Activated(module.activation)
    if not _is_timm_s(module):
        return nn.Identity()
    parts: list[Any] = [getattr(module, name) for name in ("drop", "act")]
    real = [part for part in parts if not isinstance(part, nn.Identity) or has_hooks(part)]
    return nn.Sequential(*real) if len(real) > 1 else real[0] if real else nn.Identity()


class Activated(InPlaceOfLayer):
    """What is left of a folded layer of ours: activation(x + residual), called as the layer was."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            input = (input + residual).to(input.dtype)
        if self.activation in _IN_PLACE and not (torch.is_grad_enabled() and input.requires_grad):
            return _IN_PLACE[self.activation](
                input
            )  # made by what the layer was folded into, for nobody else
        return activate(input, self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


_IN_PLACE: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": partial(F.relu6, inplace=True),
    "silu": partial(F.silu, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}
TORCH_S = (
    nn.BatchNorm1d.forward,
    nn.BatchNorm2d.forward,
    nn.BatchNorm3d.forward,
    nn.SyncBatchNorm.forward,
)


def _forward_is_known(module: nn.Module) -> bool:
    return type(module).forward in TORCH_S or _is_timm_s(module)


def _is_timm_s(module: nn.Module) -> bool:
    return type(module).__name__.startswith("BatchNormAct") and all(
        isinstance(getattr(module, name, None), nn.Module) for name in ("drop", "act")
    )


def _affine_of_ours(layer: Any) -> Affine:
    holder = layer.active_statistics()
    names = (holder.running_mean, holder.running_var, layer.weight, layer.bias)
    mean, variance, weight, bias = (None if each is None else each.detach().double() for each in names)
    if mean is None or variance is None:
        raise Left("normalizes by the batch in evaluation too")
    return Affine.normalising(mean, variance, weight, bias, layer.eps)


def _affine(operation: Operation, tensor: GetTensor) -> Affine:
    """What a call of one of torch's operators computes."""
    if not normalizes_by_constants(operation):
        raise Left("normalizes by the batch in evaluation too")
    found = []
    for name in ("running_mean", "running_var", "weight", "bias"):
        value = operation.argument(name)
        if value is not None:
            value = behind_layout(value)
            if value.kind not in ("parameter", "buffer"):
                raise Left("its statistics or parameters are computed")
        found.append(None if value is None else tensor(value))
    mean, variance, weight, bias = found
    assert mean is not None and variance is not None
    eps = operation.argument("epsilon" if operation.name.startswith("aten.cudnn") else "eps")
    return Affine.normalising(mean, variance, weight, bias, eps)


_FACTORS_AND_TERMS = frozenset(
    {
        *LAYOUT,
        *BATCH_NORM,
        *(
            f"aten.{name}"
            for name in ("add", "sub", "rsub", "mul", "div", "neg", "addcmul", "addcdiv", "_to_copy", "lerp")
        ),
        *(f"aten.{name}_" for name in ("add", "sub", "mul", "div", "neg", "addcmul", "addcdiv")),
    }
)


def _check_operations(call: ModuleCall, value: Value) -> None:
    """Raise Left if the call does more to its input than multiply and shift it: a clamp shows for some values."""
    changed = {value}
    for operation in call.operations:
        if not changed.intersection(operation.reads):
            continue
        if operation.name not in _FACTORS_AND_TERMS:
            raise Left(
                f"is {type(call.module).__name__}, which does more in evaluation than multiply and shift each channel: "
                f"{operation.name}"
            )
        changed.update(operation.results)


def _seen_affine(module: nn.Module, shape: torch.Size) -> Affine:
    """The factors and terms by which a layer of any class does what it does, if it is that. Raises: Left."""
    layer, kind = copy.deepcopy(module).double(), type(module).__name__
    generator = torch.Generator().manual_seed(0)
    random = 3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        try:
            zero, one, found = (layer(x.clone()) for x in (random * 0, torch.ones_like(random), random))
        except Exception as error:
            raise Left(f"is {kind}, which does not compute in float64 ({type(error).__name__})") from None
    if (
        any(each.shape != shape or each.dtype != torch.float64 for each in (zero, one, found))
        or not shape.numel()
    ):
        raise Left(f"is {kind}, which does not compute in float64")
    shift = zero.transpose(0, 1).flatten(1)[:, 0]
    scale = one.transpose(0, 1).flatten(1)[:, 0] - shift
    expected = random * channelwise(scale, random) + channelwise(shift, random)
    if not bool((found - expected).abs().max() <= _SAME * expected.abs().max()):
        raise Left(f"is {kind}, which does more in evaluation than multiply and shift each channel")
    return Affine(scale, shift)
