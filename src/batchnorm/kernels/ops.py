"""Batch normalization as one differentiable step, by whichever kernels are in use and can.

native     on a CPU: one node of the autograd graph, which saves x and 2·C numbers
the same   as operators of torch's dispatcher, where a compiler or another observer has to see them
torch      its own kernels, on every other device
reference  plain torch operations: for torch.func's transforms, forward-mode gradients, gradients of gradients
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchnorm.kernels import choice, reference
from batchnorm.kernels.observers import needs_dispatcher, transformed
from batchnorm.kernels.padding import Padding
from batchnorm.kernels.reference import Activation, Exchange, Given, activate
from batchnorm.moments import Moments, accumulator, channelwise, count_per_channel, statistics_dtype

if choice.built():
    from batchnorm.kernels import joint, native, node, operators


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation = None,
    residual: Tensor | None = None,
    given: Given | None = None,
    group: int = 0,
    mask: Tensor | None = None,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Moments | None]:
    """activation(bn(x) + residual) of `x`, (N, C, *S), and the moments it was normalised by, detached.

    By the mean and variance `given`, which are constants, and then None is returned; or else by the moments of the
    batch, or of each `group` of so many samples, in which only positions of the `mask` have a say, see
    moments.positions, or by what `exchange` makes of these. Where the mask is False, input and residual may hold
    anything and the output is 0.
    """
    if mask is None:
        return _normalise(x, weight, bias, eps, activation, residual, given, group, None, exchange)
    if residual is not None:
        residual = torch.where(mask, residual, 0)
    padding = None
    if given is None:
        padding = Padding.of(x, mask, group)
        x = padding.fill(x)
    else:  # nobody counts: only what is under the mask must be harmless
        x = torch.where(mask, x, channelwise(given[0].detach().to(x.dtype), x))
    y, moments = _normalise(x, weight, bias, eps, activation, residual, given, group, padding, exchange)
    return torch.where(mask, y, 0), moments


def _normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation,
    residual: Tensor | None,
    given: Given | None,
    group: int,
    padding: Padding | None,  # filled already
    exchange: Exchange | None,
) -> tuple[Tensor, Moments | None]:
    moments: Moments | None
    in_steps = given is None and (padding is not None or exchange is not None)
    kernels = _kernels_for(x, in_steps)
    if kernels == "native":
        fused = _fused(x, activation, residual)
        within, added = (native.NONE, None) if fused is None else (fused, residual)
        if in_steps:
            y, moments = joint.forward(x, weight, bias, added, eps, within, group, padding, exchange)
        else:
            y, moments = _native(x, weight, bias, added, eps, within, given, group)
        if fused is not None:
            return y, moments
    elif kernels == "torch" and (given is not None or not (in_steps or group)):
        y, moments = _by_torch(x, weight, bias, eps, given)
    else:
        mask = None if padding is None else padding.mask
        y, moments = reference.batch_norm(x, weight, bias, eps, given, group, mask, exchange)
    return activate(y, activation, residual), moments


def moments(x: Tensor, mask: Tensor | None = None, group: int = 0) -> Moments:
    """The moments that `normalise` would find, detached."""
    with torch.no_grad():
        if _kernels_for(x, in_steps=True) != "native":
            return reference.moments(x, mask, group)
        padding = None if mask is None else Padding.of(x, mask, group)
        return joint.own_moments(x if padding is None else padding.fill(x), padding, group)


def total(parts: Moments) -> Moments:
    """`Moments.total`, with a count that is a number where the native kernels know it."""
    count, mean, m2 = parts.count, parts.mean, parts.m2
    assert isinstance(count, Tensor)
    if (
        count.numel() != mean.size(0)
        or _kernels_for(mean, in_steps=True) != "native"
        or (torch.is_grad_enabled() and (mean.requires_grad or m2.requires_grad))
        or mean.stride(1) != 1
        or mean.stride() != m2.stride()
    ):
        return parts.total()
    return Moments(*native.total(count.reshape(-1).double(), mean, m2))


def _kernels_for(x: Tensor, in_steps: bool = False) -> choice.Name:
    """Which kernels compute for `x`; `in_steps`: by several calls, which only autograd may see."""
    # torch.func's transforms and forward-mode gradients need every step, not one node
    if transformed():
        return "reference"
    # torch.jit.trace records torch's operations only
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        return "torch"
    kernels = choice.active()
    if x.numel() == 0 and not in_steps:
        return "reference"
    if kernels == "native" and not x.is_cpu:
        return "torch"
    if kernels == "native" and in_steps and needs_dispatcher(x):
        return "reference"
    return kernels


def _fused(x: Tensor, activation: Activation, residual: Tensor | None) -> native.Fused | None:
    """What the native kernels call `activation`, if they can do all that follows the normalisation."""
    if residual is not None and (residual.dtype != x.dtype or residual.device != x.device):
        return None
    if activation is None:
        return native.NONE
    if isinstance(activation, nn.Module):
        return _fused_module(activation)
    return native.FUSED.get(activation) if isinstance(activation, str) else None


def _fused_module(module: nn.Module) -> native.Fused | None:
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return None
    if type(module) is nn.ReLU:
        return native.FUSED["relu"]
    if type(module) is nn.ReLU6:
        return native.FUSED["relu6"]
    # of a negative slope y's sign would not tell that of its input
    if type(module) is nn.LeakyReLU and module.negative_slope >= 0:
        return native.LEAKY_RELU, module.negative_slope
    return None


def _by_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, given: Given | None
) -> tuple[Tensor, Moments | None]:
    dtype = accumulator(x.dtype)
    weight, bias = (None if values is None else values.to(dtype) for values in (weight, bias))
    if given is not None:
        mean, variance = (values.to(dtype, copy=True) for values in given)
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, True), None
    channels, count = x.size(1), count_per_channel(x)
    # with a momentum of 1 the "running" statistics become this batch's own, the variance unbiased
    mean, variance = (torch.zeros(channels, dtype=dtype, device=x.device) for _ in range(2))
    y = torch.batch_norm(x, weight, bias, mean, variance, True, 1.0, eps, True)
    wide = statistics_dtype(x.device)
    return y, Moments(count, mean.to(wide), variance.to(wide) * (count - 1))


def _native(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: native.Fused,
    given: Given | None,
    group: int,
) -> tuple[Tensor, Moments | None]:
    _check_devices(x, weight, bias, *(given or ()))
    if needs_dispatcher(x, weight, bias, residual):
        y, mean, m2 = operators.forward(x, weight, bias, residual, eps, activation, given, group)
    elif torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        y, mean, m2 = node.forward(x, weight, bias, residual, eps, activation, given, group)
    else:
        y, mean, m2 = native.forward(x, weight, bias, residual, eps, activation, given, group)
    return y, None if given is not None else Moments(reference.count(x, group), mean, m2)


def _check_devices(x: Tensor, *per_channel: Tensor | None) -> None:
    for values in per_channel:
        if values is not None and not values.is_cpu:
            raise RuntimeError(
                f"the input is on {x.device} but a weight, bias or running statistic on {values.device}: "
                "move them to one device, e.g. with model.to(input.device)"
            )


def track(
    moments: Moments,
    running_mean: Tensor,
    running_var: Tensor,
    rate: float | Tensor,
    batches: Tensor | None = None,
) -> bool | Tensor:
    """Move the running statistics towards `moments`, in place, by `rate`: the weight of the new batch.

    The variance enters unbiased. Moments that are not all finite, or of fewer than two values, do not enter; the
    batches that do are counted in `batches`, int64 and 0-dimensional.

    Returns: whether the moments entered; a 0-dimensional bool tensor where a device would have to be waited for.
    """
    if (
        choice.active() == "native"
        and isinstance(moments.count, int)
        and not needs_dispatcher(running_mean, running_var)
        and not torch._C._are_functorch_transforms_active()
        and native.trackable(moments.mean, running_mean, running_var, batches)
    ):
        mean, m2 = moments.mean, moments.m2
        return native.track(moments.count, mean, m2, running_mean, running_var, float(rate), batches)
    return reference.track(moments, running_mean, running_var, rate, batches)
