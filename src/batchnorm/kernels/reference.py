"""The kernels of batch normalization in plain torch: what they mean, the fallback, and the oracle.

Each is written to be read beside section 3 of Ioffe & Szegedy (2015), works for any floating dtype (float64
included), any rank (N, C, *S) and any memory layout, and is differentiable. A faster twin has the same name
and signature and is tested against this one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm.kernels.call import Activation, Call, FixedStatistics
from batchnorm.moments import (
    Affine,
    Moments,
    accumulator,
    batch_dims,
    channelwise,
    count_per_channel,
    of_masked,
)


def groups(samples: int, size: int) -> int:
    """How many groups of `size` there are; what is left over joins the last one."""
    return max(1, samples // size)


def group_of(x: Tensor, size: int) -> Tensor:
    """(N,) the group of each sample of `x`."""
    return (torch.arange(x.size(0), device=x.device) // size).clamp(max=groups(x.size(0), size) - 1)


def count(x: Tensor, group: int = 0) -> int | Tensor:
    """How many values each channel has; with `group`, each channel of each group, (groups, 1)."""
    each = count_per_channel(x)
    if group == 0:
        return each
    sizes = torch.full((groups(x.size(0), group), 1), group * (each // max(1, x.size(0))), device=x.device)
    sizes[-1] = each - int(sizes[0]) * (sizes.size(0) - 1)
    return sizes


def moments(x: Tensor, mask: Tensor | None = None, group: int = 0) -> Moments:
    """Count, mean and m2 of each channel of `x`, (N, C, *S) (alg. 1, lines 1-2); with `group`, of each group."""
    if group == 0:
        return _moments(x, mask)
    split = (groups(x.size(0), group) - 1) * group
    last = _moments(x[split:], None if mask is None else mask[split:])
    if split == 0:
        return Moments(_row(last.count, x), last.mean[None], last.m2[None])
    side_by_side = _as_channels(x[:split], group)
    mask_side_by_side = None if mask is None else _as_channels(mask[:split].expand_as(x[:split]), group)
    first = _moments(side_by_side, mask_side_by_side)
    mean, m2 = (values.unflatten(0, (-1, x.size(1))) for values in (first.mean, first.m2))
    if mask is None:
        counts = count(x, group)
    else:
        of_groups = torch.as_tensor(first.count).unflatten(0, (-1, x.size(1)))
        counts = torch.cat(
            [of_groups if mask.size(1) == x.size(1) else of_groups[:, :1], _row(last.count, x)]
        )
    return Moments(
        counts,
        torch.cat([mean, last.mean[None]]),
        torch.cat([m2, last.m2[None]]),
    )


def _moments(x: Tensor, mask: Tensor | None) -> Moments:
    return Moments.of(x) if mask is None else of_masked(x, mask)


def _row(count: int | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(count, device=x.device).reshape(1, -1)


def _as_channels(x: Tensor, group: int) -> Tensor:
    """(N, C, *S) as (group, N/group·C, *S): every channel of every group is a channel."""
    joined: Tensor = x.unflatten(0, (-1, group)).transpose(0, 1).flatten(1, 2)
    return joined


def mean_and_variance(moments: Moments) -> FixedStatistics:
    """Those to normalise by, the variance biased; 0 and 1 where there is nothing to normalise."""
    if isinstance(moments.count, int):
        if moments.count > 0:
            return moments.mean, moments.m2 / moments.count
        return torch.zeros_like(moments.mean), torch.ones_like(moments.m2)
    some = moments.count > 0
    variance = moments.m2 / moments.count.clamp(min=1)
    return torch.where(some, moments.mean, 0), torch.where(some, variance, 1)


def normalise(
    x: Tensor,
    statistics: FixedStatistics,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: int = 0,
) -> Tensor:
    """y = weight·x̂ + bias with x̂ = (x - mean) / √(variance + eps), in x's dtype (alg. 1, lines 3-4)."""
    mean, variance = statistics
    affine = Affine.normalising(mean, variance, weight, bias, eps)
    if group:
        groups = group_of(x, group)
        affine, mean = Affine(affine.scale[groups], affine.shift[groups]), mean[groups]
    return affine(x, about=mean)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call
) -> tuple[Tensor, Moments | None]:
    """Normalise `x` as `call` says, activation aside; return the moments too, detached, if they are its own."""
    if not call.training:
        assert call.statistics is not None
        mean, variance = call.statistics
        # a copy, for autograd may keep it and a later batch moves the buffer
        return normalise(x, (mean.clone(), variance), weight, bias, call.eps), None

    def own() -> Moments:
        return moments(x, call.mask, call.group)

    found = own() if call.exchange is None else call.exchange.moments(own)
    detached = Moments(found.count, found.mean.detach(), found.m2.detach())
    return normalise(x, mean_and_variance(found), weight, bias, call.eps, call.group), detached


def backward(
    dy: Tensor, x: Tensor, moments: Moments, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `normalise` with `moments` taken from `x` itself: (dx, dweight, dbias).

        dbias = Σ dy      dweight = Σ dy·x̂      dx = scale · (dy - dbias/count - x̂·dweight/count)

    which is the chain of section 3's six equations with the middle terms cancelled; scale = weight / √(variance + eps).
    dx has x's shape and dtype; dweight and dbias are (C,) in the accumulator's dtype.
    """
    dtype, dims = accumulator(x.dtype), batch_dims(x)
    share = 1 / max(moments.count, 1)
    standardise = Affine.of(moments, None, None, eps)
    scale = standardise.scale if weight is None else standardise.scale * weight
    dy, standardised = dy.to(dtype), standardise(x.to(dtype), about=moments.mean)
    dbias, dweight = dy.sum(dims), (dy * standardised).sum(dims)
    dx = torch.addcmul(dy - channelwise(dbias * share, x), standardised, channelwise(dweight * -share, x))
    return (dx * channelwise(scale.to(dtype), x)).to(x.dtype), dweight, dbias


@torch.no_grad()
def track(
    moments: Moments,
    running_mean: Tensor,
    running_var: Tensor,
    rate: float | Tensor,
    batches: Tensor | None = None,
) -> Tensor:
    """See functional.track; no branch, so that no device has to be waited for."""
    # asked of the values as they would be stored: a finite float64 may be beyond float32
    mean = moments.mean.to(running_mean.dtype)
    variance = moments.variance(unbiased=True).to(running_var.dtype)
    if isinstance(moments.count, Tensor) and moments.count.dim() == 1:  # a channel may have nothing to say
        known = moments.count > 1
        mean, variance = torch.where(known, mean, running_mean), torch.where(known, variance, running_var)
        entered = (mean + variance).isfinite().all() & known.any()
    else:
        entered = (mean + variance).isfinite().all()
    for running, batch in ((running_mean, mean), (running_var, variance)):
        running.copy_(torch.where(entered, running.lerp(batch, rate), running))
    if batches is not None:
        batches.add_(entered)
    return entered


# What may follow the normalisation, by torch's names; each takes and returns a tensor.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": torch.nn.functional.leaky_relu,  # slope 0.01, torch's default
    "relu6": torch.nn.functional.relu6,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def activate(output: Tensor, activation: Activation = None, residual: Tensor | None = None) -> Tensor:
    """activation(output + residual), in output's dtype before the activation."""
    if residual is not None:
        output = (output + residual).to(output.dtype)
    function = activation_function(activation)
    return output if function is None else function(output)


def activation_function(activation: Activation) -> Callable[[Tensor], Tensor] | None:
    """The function that `activation` names, itself if it is one already, None for None; or ValueError."""
    if isinstance(activation, type):  # a class is callable, but what it returns is no tensor
        raise ValueError(
            f"activation is the class {activation.__name__}: pass an instance, {activation.__name__}()"
        )
    if activation is None or callable(activation):
        return activation
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        names = ", ".join(f'"{name}"' for name in ACTIVATIONS)
        raise ValueError(f"unknown activation {activation!r}: use {names}, None, or a module")
    return ACTIVATIONS[activation]
