"""Backend dispatch: batch normalization as one differentiable step, by whichever kernels are in use and can.

native     on a CPU: one node of the autograd graph, which saves x and 2·C numbers
the same   as operators of torch's dispatcher, where a compiler or another observer has to see them
triton     the same on a GPU, where `use("triton")` says so
torch      its own kernels, on every other device; in a captured graph what its own layer would have put there
reference  plain torch operations: for torch.func's transforms, forward-mode gradients, gradients of gradients
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.kernels import choice, fused_operators, recipes, reference, triton_launches
from batchnorm.kernels.call import NOT_FUSED, Activation, Call, Fused
from batchnorm.kernels.observers import captured, needs_dispatcher, transformed
from batchnorm.kernels.padding import Padding
from batchnorm.kernels.reference import activate
from batchnorm.moments import Moments, accumulator, channelwise, count_per_channel, statistics_dtype

if choice.built():
    from batchnorm.kernels import native, node, operators, stepwise


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> Tensor:
    """activation(bn(x) + residual) of `x`, (N, C, *S), as `call` says; fills in what it says that the kernels set.

    Where the mask is False, input and residual may hold anything and the output is 0.
    """
    if call.mask is not None and call.padding is None:
        return _masked(x, weight, bias, residual, call, call.mask)
    backend = _backend(x, call.stepwise)
    if backend == "triton" and not _triton_can(x, weight, bias, call):
        backend = "torch"
    if backend not in ("native", "triton"):
        if backend == "torch" and (not call.training or not (call.stepwise or call.group)):
            y = _by_torch(x, weight, bias, call)
        else:
            y, call.moments = reference.batch_norm(x, weight, bias, call)
        return activate(y, call.activation, residual)
    if backend == "triton":
        call.kernels = triton_launches
    fused = _fused(x, call.activation, residual)
    added = None if fused is None else residual
    if fused is not None:
        call.fused = fused
        call.updates_inline = call.rate is not None and not call.stepwise and not call.group
    if recipes.active() is None:
        y = _natively(x, weight, bias, added, call)
    else:
        # it notes its own result, and a function mode would take 2 µs for each attribute that it reads
        with torch._C.DisableTorchFunction():
            y = _natively(x, weight, bias, added, call)
    return activate(y, call.activation, residual) if fused is None else y


def _natively(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, added: Tensor | None, call: Call
) -> Tensor:
    _check_devices(x, weight, bias, call)
    if not call.stepwise and needs_dispatcher(x, weight, bias, added):
        return operators.forward(x, weight, bias, added, call)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (added is not None and added.requires_grad)
    ):
        if not call.training and call.statistics is not None:
            # copies, for the node keeps them and a later batch moves the buffers
            mean, variance = call.statistics
            call.statistics = mean.clone(), variance.clone()
        return cast(Tensor, node.Normalise.apply(x, weight, bias, added, call))
    return (stepwise.forward if call.stepwise else stepwise.kernels_of(call).forward)(
        x, weight, bias, added, call
    )


def _masked(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call, mask: Tensor
) -> Tensor:
    if residual is not None:
        residual = torch.where(mask, residual, 0)
    if call.fixed is None:
        padding = Padding.of(x, mask, call.group)
        call.padding, call.stepwise = padding, True
        return torch.where(mask, normalise(padding.fill(x), weight, bias, residual, call), 0)
    # nothing is counted: only what is under the mask must be harmless
    x = torch.where(mask, x, channelwise(call.fixed[0].detach().to(x.dtype), x))
    call.mask = None
    return torch.where(mask, normalise(x, weight, bias, residual, call), 0)


def moments(x: Tensor, mask: Tensor | None = None, group: int = 0) -> Moments:
    """The moments that `normalise` would find, detached."""
    x = x.detach()
    backend = _backend(x, stepwise=True)
    if backend == "triton" and mask is None and x.numel():
        return stepwise.own_moments(x, None, group, triton_launches)
    if backend != "native":
        return reference.moments(x, mask, group)
    padding = None if mask is None else Padding.of(x, mask, group)
    return stepwise.own_moments(x if padding is None else padding.fill(x), padding, group)


def total(parts: Moments) -> Moments:
    """`Moments.total`, with a count that is a number where the native kernels know it."""
    count, mean, m2 = parts.count, parts.mean, parts.m2
    assert isinstance(count, Tensor)
    if (
        _backend(mean, stepwise=True) != "native"
        or count.numel() != mean.size(0)
        or (torch.is_grad_enabled() and (mean.requires_grad or m2.requires_grad))
        or mean.stride(1) != 1
        or mean.stride() != m2.stride()
    ):
        return parts.total()
    return Moments(*native.total(count.reshape(-1).double(), mean, m2))


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
    count, mean, m2 = moments.count, moments.mean, moments.m2
    if (
        isinstance(count, int)
        and mean.is_cpu
        and mean.dtype == torch.float64
        and not needs_dispatcher(running_mean, running_var)
        and not torch._C._are_functorch_transforms_active()
        and choice.on_cpu() == "native"  # last: the first time sets a global, which torch.export warns of
    ):
        call = Call(True, 0.0, None, running_mean, running_var, rate, batches)
        entered = native.track(call, mean, m2, count)
        if entered is not None:
            return entered
    return reference.track(moments, running_mean, running_var, rate, batches)


def _triton_can(x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call) -> bool:
    """Whether Triton's kernels compute `call`: not with padding, of which the device would have to be asked."""
    _check_devices(x, weight, bias, call)  # an error, and no slower way
    if call.padding is not None or not x.numel():
        return False
    return torch.compiler.is_compiling() or triton_launches.supports(x, weight, bias, None, call)


def _backend(x: Tensor, stepwise: bool = False) -> choice.Name:
    """Which kernels compute for `x`; `stepwise`: by several calls, which only autograd may see."""
    # torch.func's transforms and forward-mode gradients need every step, not one node
    if transformed():
        return "reference"
    if captured():
        return "torch"
    kernels = choice.active()
    if x.numel() == 0 and not stepwise:
        return "reference"
    if kernels == "triton":
        # a compiler cannot follow what is cached
        if x.is_cuda if torch.compiler.is_compiling() else triton_launches.usable(x.device):
            return "reference" if stepwise and needs_dispatcher(x) else "triton"
        kernels = "native"
    if kernels == "native":
        if not x.is_cpu:
            return "torch"
        if stepwise and needs_dispatcher(x):
            return "reference"
    return kernels


def _fused(x: Tensor, activation: Activation, residual: Tensor | None) -> Fused | None:
    """What the native kernels call `activation`, if they can do all that follows the normalisation."""
    if residual is not None and (residual.dtype != x.dtype or residual.device != x.device):
        return None
    if activation is None:
        return NOT_FUSED
    if isinstance(activation, str):
        return native.FUSED.get(activation)
    return _fused_module(activation) if isinstance(activation, nn.Module) else None


def _fused_module(module: nn.Module) -> Fused | None:
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


def _by_torch(x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call) -> Tensor:
    dtype = accumulator(x.dtype)
    weight, bias = (
        values if values is None or values.dtype == dtype else values.to(dtype) for values in (weight, bias)
    )
    if captured():
        return _as_captured(x, weight, bias, call)
    if call.fixed is not None:
        mean, variance = (values.to(dtype, copy=True) for values in call.fixed)
        return _torch_batch_norm(x, weight, bias, mean, variance, False, 0.0, call.eps)
    channels, count = x.size(1), count_per_channel(x)
    # with a momentum of 1 the "running" statistics become this batch's own, the variance unbiased
    zeros = torch.zeros(2 * channels + 1, dtype=dtype, device=x.device)
    mean, variance, flag = zeros.split([channels, channels, 1])
    y = _torch_batch_norm(x, weight, bias, mean, variance, True, 1.0, call.eps)
    call.found = count, mean, variance
    if call.rate is not None:
        call.updated = _follow(call, mean, variance, flag, count)
    return y


def _follow(call: Call, mean: Tensor, variance: Tensor, flag: Tensor, count: int) -> bool | Tensor | None:
    """Move the running statistics of `call` as `track`, by what torch's operator found, in few operations.

    flag: (1,), 0.

    Returns: as `track`; None, and nothing done, where only `track` can.
    """
    if torch.compiler.is_compiling() or _is_proxy(mean) or count < 2:
        return None
    if mean.is_cpu and choice.built():
        return native.track_unbiased(call, mean, variance, count)
    return fused_operators.track(call, mean, variance, flag)


def _is_proxy(x: Tensor) -> bool:
    """Whether `x` stands for another one in a trace, which has to see every operation."""
    proxies = torch._C._TorchDispatchModeKey.PROXY
    return type(x) is not Tensor or torch._C._get_dispatch_mode(proxies) is not None


def _torch_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """torch's operator; where a side of an image is 1, on its positions in one dimension, (N, C, positions).

    The strides of such an image are those of two memory formats at once, and torch's backward on a CPU (2.14) then
    may read a gradient in the other one, which gives wrong values without an error.
    """
    flat = x.flatten(2) if x.is_cpu and x.dim() > 3 and 1 in x.shape[2:] else x
    y = torch.batch_norm(flat, weight, bias, mean, variance, training, momentum, eps, True)
    return y if flat is x else y.view_as(x)


def _as_captured(x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call) -> Tensor:
    """One call of torch's operator, on the running statistics themselves, as its own layer makes it.

    Tools that turn a training graph into one for evaluation (pt2e's, for quantization-aware training) change the
    operator's `training` and expect the running statistics among its arguments. They know nothing of what is done
    beside it, which therefore must come to nothing then: an average whose rate is no constant takes the batch's
    moments from what the operator does to copies, which in evaluation is nothing.
    """
    mean, variance, rate = call.running_mean, call.running_var, call.rate
    dtype = accumulator(x.dtype)
    if mean is None or variance is None:
        return F.batch_norm(x, None, None, weight, bias, call.training, 0.0, call.eps)
    if rate is not None:
        call.updated = True  # by what is captured here
        if call.batches is not None:
            call.batches.add_(1)
    if mean.dtype == dtype and not (call.training and (rate is None or isinstance(rate, Tensor))):
        momentum = rate if isinstance(rate, float) else 0.0
        return F.batch_norm(x, mean, variance, weight, bias, call.training, momentum, call.eps)
    # with a momentum of 1 the copies become the batch's own, the variance unbiased
    own_mean, own_variance = (values.to(dtype, copy=True) for values in (mean, variance))
    y = F.batch_norm(x, own_mean, own_variance, weight, bias, call.training, 1.0, call.eps)
    if call.training:
        count, wide = count_per_channel(x), statistics_dtype(x.device)
        call.moments = Moments(count, own_mean.to(wide), own_variance.to(wide) * (count - 1))
    if rate is not None:
        for running, batch in ((mean, own_mean), (variance, own_variance)):
            running.copy_(running.lerp(batch.to(running.dtype), rate))
    return y


def _check_devices(x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call) -> None:
    """Raise RuntimeError for what the kernels would read from, and is not where x is."""
    device = x.device
    if not ((weight is None or weight.device == device) and (bias is None or bias.device == device)):
        raise _other_device(x, weight, bias)
    if call.statistics is not None and any(each.device != device for each in call.statistics):
        raise _other_device(x, *call.statistics)


def _other_device(x: Tensor, *per_channel: Tensor | None) -> RuntimeError:
    elsewhere = next(
        values.device for values in per_channel if values is not None and values.device != x.device
    )
    return RuntimeError(
        f"the input is on {x.device} but a weight, bias or running statistic on {elsewhere}: "
        "move them to one device, e.g. with model.to(input.device)"
    )
