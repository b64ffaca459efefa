"""Convolutions for inference on a CPU: weights in oneDNN's own layout, and what follows done in the same call.

torch's eager convolution reorders its weight at every call, and an activation after it is another pass over memory. The
operators that torch.compile uses when it freezes a model take a weight that is reordered once, and compute
activation(W·x + b + residual) in one call. Where they cannot be used (gradients, a GPU, another dtype, an exporter) the
same is computed by torch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.graph.modules import InPlaceOfLayer, activation_of, has_hooks, is_patched
from batchnorm.graph.observation import ModuleCall, Observation, Operation
from batchnorm.kernels.call import Activation
from batchnorm.kernels.observers import captured, needs_dispatcher, transformed
from batchnorm.kernels.reference import activate
from batchnorm.passes.fold.branches import NOTHING
from batchnorm.passes.fold.normalization import Activated


class PostOp(NamedTuple):
    """An activation by oneDNN's name, with its numbers and variant."""

    name: str
    numbers: list[float]
    variant: str


_NONE = PostOp("none", [], "")
_NAMED = {
    "relu": PostOp("relu", [], ""),
    "relu6": PostOp("hardtanh", [0.0, 6.0], ""),
    "leaky_relu": PostOp("leaky_relu", [0.01], ""),
    "sigmoid": PostOp("sigmoid", [], ""),
    "tanh": PostOp("tanh", [], ""),
    "silu": PostOp("swish", [], ""),
}


class PackedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with an activation: activation(W·input + b + residual), by oneDNN where that can be.

    postponed: whether `forward` returns its input, for `Finish` to compute with the residual.
    """

    activation: Activation
    post_op: PostOp
    postponed: bool

    def forward(self, input: Tensor) -> Tensor:
        return input if self.postponed else self.compute(input)

    def compute(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The output, (N, C, H, W)."""
        if not self._can_pack(input, residual):
            return activate(self._conv_forward(input, self.weight, self.bias), self.activation, residual)
        operator: Any = torch.ops.mkldnn._convolution_pointwise
        how = self.padding, self.stride, self.dilation, self.groups
        weight = self._packed(input)
        if residual is None:
            made: Tensor = operator(input, weight, self.bias, *how, *self.post_op)
        else:
            after = (None, [], None) if self.post_op == _NONE else self.post_op
            made = operator.binary(input, residual, weight, self.bias, *how, "add", 1.0, *after)
        return made

    def _can_pack(self, input: Tensor, residual: Tensor | None) -> bool:
        tensors = (input,) if residual is None else (input, residual)
        return (
            all(each.is_cpu and each.dtype == self.weight.dtype == torch.float32 for each in tensors)
            and input.dim() == 4
            and input.numel() > 0
            and not (torch.is_grad_enabled() and any(each.requires_grad for each in (*tensors, self.weight)))
            and not captured()
            and not needs_dispatcher(*tensors)
            and not transformed()
            and not torch.is_autocast_enabled("cpu")
        )

    def _packed(self, input: Tensor) -> Tensor:
        """The weight in the layout that is best for inputs of this shape."""
        version = 0 if self.weight.is_inference() else self.weight._version
        key = input.shape, self.weight.data_ptr(), version
        cached = vars(self).get("_cached")
        if cached is None or cached[0] != key:
            how = self.padding, self.stride, self.dilation, self.groups
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight.detach(), *how, list(input.shape)
            )
            vars(self)["_cached"] = cached = key, packed
        found: Tensor = cached[1]
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_cached"}

    def extra_repr(self) -> str:
        """As of torch's, and the activation."""
        own: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return own + ("" if self.activation is None else f", activation={self.activation!r}")


class Finish(InPlaceOfLayer):
    """In the place of what was behind a convolution: the convolution itself, with the residual and the activation."""

    def __init__(self, convolution: PackedConv2d) -> None:
        super().__init__()
        vars(self)["convolution"] = convolution  # not as a child: it has its place in the model
        self.activation = convolution.activation

    def forward(self, input: Tensor, residual: Any = None) -> Tensor:
        """The output of the convolution of `input`."""
        if residual is NOTHING:  # of a branch that has been folded into a convolution
            residual = None
        made: Tensor = vars(self)["convolution"].compute(input, residual)
        return made


def post_op_of(activation: Activation | nn.Module) -> PostOp | None:
    """What oneDNN calls an activation, or None."""
    match activation:
        case nn.Hardswish():
            return PostOp("hardswish", [], "") if type(activation) is nn.Hardswish else None
        case nn.GELU(approximate=variant):
            return PostOp("gelu", [], variant) if type(activation) is nn.GELU else None
        case nn.LeakyReLU(negative_slope=slope):
            return PostOp("leaky_relu", [slope], "") if type(activation) is nn.LeakyReLU else None
        case nn.Module():
            named = activation_of(activation)
            return _NAMED[named] if isinstance(named, str) else None
        case str():
            return _NAMED.get(activation)
    return _NONE if activation is None else None


def pack(model: nn.Module, seen: Observation) -> int:
    """Pack the convolutions of a folded model, in place; returns how many.

    seen: of the model, or of a copy.
    """
    packed = 0
    for operation in seen.operations:
        call = operation.call
        if operation.name != "aten.convolution" or call is None or not _is_plain(call, operation):
            continue
        module = model.get_submodule(call.path)
        after = _after(operation, seen)
        activation, post_op, postponed = None, _NONE, False
        if after is not None:
            behind = model.get_submodule(after.path)
            activation = behind.activation if isinstance(behind, Activated) else behind
            post_op = post_op_of(activation) or _NONE
            postponed = len(after.given) == 2 or isinstance(behind, Activated)
        module.__class__ = PackedConv2d
        assert isinstance(module, PackedConv2d)
        vars(module).update(activation=activation, post_op=post_op, postponed=postponed)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        if after is not None:
            place: nn.Module = Finish(module) if postponed else nn.Identity()
            parent, _, name = after.path.rpartition(".")
            setattr(model.get_submodule(parent), name, place.eval())
        packed += 1
    return packed


def _is_plain(call: ModuleCall, operation: Operation) -> bool:
    module = call.module
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and not has_hooks(module)
        and not is_patched(module)
        and call.returns == operation.results
        and not call.path.endswith(">")
    )


def _after(operation: Operation, seen: Observation) -> ModuleCall | None:
    """The call of an activation, or of what is left of a layer of ours, that alone reads a convolution's output."""
    (made,) = operation.results
    calls = {user.call for user in made.users}
    if made.is_output or len(calls) != 1 or operation.call is None:
        return None
    (after,) = calls
    if after is None or not after.given or after.given[0] is not made or after.path.endswith(">"):
        return None
    module = after.module
    alone = len(seen.calls_of(module)) == len(seen.calls_of(operation.call.module)) == 1
    if not alone or has_hooks(module) or is_patched(module):
        return None
    activation = module.activation if isinstance(module, Activated) else module
    return after if post_op_of(activation) is not None else None
