"""The kernels of batch normalization in plain torch: what they mean, the fallback, and the oracle.

Each is written to be read beside section 3 of Ioffe & Szegedy (2015), works for any floating dtype (float64
included), any rank (N, C, *S) and any memory layout, and is differentiable. A faster twin has the same name
and signature and is tested against this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from batchnorm.kernels.call import Activation, Call, FixedStatistics
from batchnorm.kernels.observers import captured
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
    return cast(int, torch.sym_max(1, samples // size))  # it may be an exporter's symbol


def group_of(x: Tensor, size: int) -> Tensor:
    """(N,) the group of each sample of `x`."""
    return (torch.arange(x.size(0), device=x.device) // size).clamp(max=groups(x.size(0), size) - 1)


def total_of_groups(values: Tensor, which: Tensor, size: int) -> Tensor:
    """Σ over the samples of each group, (groups, C), of `values`, (N, C); `which` is their group_of.

    In a captured graph, (N, C), where the last rows are those of no group: the number of groups is no shape there.
    """
    samples, channels = values.shape
    rows = samples if captured() else groups(samples, size)
    return values.new_zeros(rows, channels).index_add(0, which, values)


def count(x: Tensor, group: int = 0) -> int | Tensor:
    """How many values each channel has; with `group`, each channel of each group, (groups, 1)."""
    each = count_per_channel(x)
    if group == 0:
        return each
    number, of_group = groups(x.size(0), group), group * math.prod(x.shape[2:])
    sizes = torch.full((number, 1), of_group, device=x.device)
    sizes[-1] = each - of_group * (number - 1)
    return sizes


def moments(x: Tensor, mask: Tensor | None = None, group: int = 0) -> Moments:
    """Count, mean and m2 of each channel of `x`, (N, C, *S) (alg. 1, lines 1-2); with `group`, of each group."""
    if group == 0:
        return Moments.of(x) if mask is None else of_masked(x, mask)
    # those of each sample, (N, C), then merged over the samples of a group: no shape depends on what is left over
    side_by_side = x.flatten(0, 1)[None]
    if mask is None:
        each = Moments.of(side_by_side)
        counts = torch.full((x.size(0), 1), math.prod(x.shape[2:]), device=x.device)
    else:
        each = of_masked(side_by_side, mask.expand_as(x).flatten(0, 1)[None])
        counts = mask.reshape(*mask.shape[:2], -1).sum(2)
    mean, m2 = (values.unflatten(0, x.shape[:2]) for values in (each.mean, each.m2))
    which = group_of(x, group)

    def total(values: Tensor) -> Tensor:
        return total_of_groups(values, which, group)

    weight, origin = counts.to(mean.dtype), mean.detach().mean(0)  # as in Moments.total
    merged = origin + total((mean - origin) * weight) / total(weight).clamp(min=1)
    spread = (mean - merged[which]).square() * weight
    return Moments(total(counts), merged, total(m2 + spread))


def mean_and_variance(moments: Moments) -> FixedStatistics:
    """Those to normalise by, the variance biased; 0 and 1 where there is nothing to normalise."""
    if not isinstance(moments.count, Tensor):
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
        # constants, also to forward-mode gradients; a copy, for autograd may keep it and a later batch moves the buffer
        constants = mean.detach().clone(), variance.detach()
        return normalise(x, constants, weight, bias, call.eps), None

    def own() -> Moments:
        return moments(x, call.mask, call.group)

    found = own() if call.exchange is None else call.exchange.moments(own)
    return normalise(x, mean_and_variance(found), weight, bias, call.eps, call.group), _detached(found)


def _detached(moments: Moments) -> Moments:
    count = moments.count
    count = count.detach() if isinstance(count, Tensor) else count  # of ranks, it came the way of the means
    return Moments(count, moments.mean.detach(), moments.m2.detach())


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


def track(
    moments: Moments,
    running_mean: Tensor,
    running_var: Tensor,
    rate: float | Tensor,
    batches: Tensor | None = None,
) -> Tensor:
    """See functional.track; no branch, so that no device has to be waited for."""
    # asked of the values as they would be stored: a finite float64 may be beyond float32
    moments = _detached(moments)  # not under no_grad, which torch.export would put into the graph
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


# What may follow the normalisation, by torch's names; each takes and returns a tensor. By the functions of
# torch.nn.functional quantizers know in an exported graph what was called.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "leaky_relu": torch.nn.functional.leaky_relu,  # slope 0.01, torch's default
    "relu6": torch.nn.functional.relu6,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def activate(output: Tensor, activation: Activation = None, residual: Tensor | None = None) -> Tensor:
    """activation(output + residual), in output's dtype before the activation."""
    if residual is not None:
        added = output + residual
        output = added if added.dtype == output.dtype else added.to(output.dtype)  # no node in a graph
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
