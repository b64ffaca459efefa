"""What cannot be folded becomes one factor and one term for each channel, with the activation that follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm.graph.modules import InPlaceOfLayer, activation_of, has_hooks
from batchnorm.graph.observation import Observation
from batchnorm.kernels import dispatch
from batchnorm.kernels.call import Activation, Call
from batchnorm.kernels.observers import captured, needs_dispatcher
from batchnorm.kernels.reference import activate
from batchnorm.moments import accumulator, channelwise
from batchnorm.passes.fold.normalization import Activated, Left, Normalization, rest_of
from batchnorm.passes.fold.plan import Plan, Tensors, own_names


class Scale(InPlaceOfLayer):
    """activation(weight·x + bias + residual), of each channel: what a normalization is in evaluation.

    Args:
        weight: (C,) the factor; (C, *S) if it differs between positions.
        bias: the term, of the same shape.
        activation: as of `bn.BatchNorm2d`.
    """

    _mean: Tensor
    _variance: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, activation: Activation = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.activation = activation
        self.least_dims = 0
        # a normalization by them is the identity; kept, as making them costs more than small inputs do
        self.register_buffer("_mean", torch.zeros_like(weight), persistent=False)
        self.register_buffer("_variance", torch.ones_like(weight), persistent=False)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The output, (N, C, ...), of the dtype and shape of `input`."""
        if input.dim() < self.least_dims:
            return self(input[None], None if residual is None else residual[None])[0]  # type: ignore[no-any-return]
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if weight.dtype != (dtype := accumulator(input.dtype)):
            weight, bias = weight.to(dtype), bias.to(dtype)
        of_channels = weight.dim() == 1
        if captured() and of_channels:  # one operator, which runtimes have a kernel for
            made = F.batch_norm(input.to(dtype), self._mean, self._variance, weight, bias, False, 0.0, 0.0)
            return activate(made.to(input.dtype), self.activation, residual)
        if needs_dispatcher(input) or not of_channels:  # as operators that everybody knows
            if of_channels:
                weight, bias = channelwise(weight, input), channelwise(bias, input)
            made = torch.addcmul(bias, input.to(dtype), weight)
            return activate(made.to(input.dtype), self.activation, residual)
        call = Call(False, 0.0, self.activation, self._mean, self._variance)
        return dispatch.normalise(input, weight, bias, residual, call)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}" + (
            f", activation={self.activation!r}" if self.activation else ""
        )


def as_scale(model: nn.Module, seen: Observation, calls: list[Normalization], tensor: Tensors) -> Plan:
    """How a layer that cannot be folded becomes a `Scale`. Raises: Left."""
    module, path = calls[0].call.module, calls[0].path
    affine = calls[0].affine
    tensor.check_replaced(module, [each.call for each in calls])
    if any(not torch.equal(each.affine.scale, affine.scale) for each in calls):
        raise Left("its calls have different statistics")
    rest = rest_of(module)
    activation = rest.activation if isinstance(rest, Activated) else None
    modules: dict[str, nn.Module] = {}
    after: list[nn.Module] = []
    if not isinstance(rest, nn.Identity | Activated):
        activation = activation_of(rest)
        after = [] if activation is not None else [rest]
    elif activation is None and len(calls) == 1:
        follower = _activation_after(seen, calls[0], tensor)
        if follower is not None:
            activation = activation_of(model.get_submodule(follower))
            modules[follower] = nn.Identity()
    scale = Scale(affine.scale, affine.shift, activation)
    if isinstance(module, _InstanceNorm):
        scale.least_dims = len(
            calls[0].value.shape
        )  # it takes one sample without the dimension of the batch, too
    modules[path] = nn.Sequential(scale, *after) if after else scale
    what = f"with {activation}" if activation is not None else ""
    return Plan(path, "affine", what, modules=modules, touched=own_names(model, path))


def _activation_after(seen: Observation, layer: Normalization, tensor: Tensors) -> str | None:
    """The path of an activation that is called once, on the layer's output, which nothing else reads."""
    user = None if layer.output is None else layer.output.only_user
    if user is None or user.call is None:
        return None
    module, path = user.call.module, user.call.path
    if activation_of(module) is None or has_hooks(module) or len(seen.calls_of(module)) != 1:
        return None
    assert layer.output is not None
    try:
        tensor.check_changed([layer.output])
    except Left:
        return None
    return path if user.call.given == [layer.output] and not user.call.path.endswith(">") else None
