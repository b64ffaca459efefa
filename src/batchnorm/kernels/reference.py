"""The kernels of batch normalization in plain torch: what they mean, the fallback, and the oracle.

Each is written to be read beside section 3 of Ioffe & Szegedy (2015), works for any floating dtype (float64
included), any rank (N, C, *S) and any memory layout, and is differentiable. A faster twin has the same name
and signature and is tested against this one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm.moments import Affine, Moments, accumulator, batch_dims, channelwise, count_per_channel

Given = tuple[Tensor, Tensor]  # a mean and a variance, (C,) each


def moments(x: Tensor) -> Moments:
    """Count, mean and m2 of each channel of `x`, (N, C, *S) (alg. 1, lines 1-2)."""
    return Moments.of(x)


def normalise(x: Tensor, moments: Moments, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """y = weight·x̂ + bias with x̂ = (x - mean) / √(variance + eps), in x's dtype (alg. 1, lines 3-4)."""
    return Affine.of(moments, weight, bias, eps)(x, about=moments.mean)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, given: Given | None
) -> tuple[Tensor, Moments | None]:
    """Normalise `x` by its own moments, and return these detached; or by those `given`, constants, and return None."""
    if given is not None:
        # a copy, for autograd may keep it and a later batch moves the buffer
        mean = given[0].clone()
        return Affine.normalising(mean, given[1], weight, bias, eps)(x, about=mean), None
    own = moments(x)
    detached = Moments(own.count, own.mean.detach(), own.m2.detach())
    if count_per_channel(x) == 0:  # nothing to normalise, by anything; and no nan for a gradient to meet
        anything = torch.ones_like(detached.mean)
        return Affine.normalising(anything, anything, weight, bias, eps)(x), detached
    return normalise(x, own, weight, bias, eps), detached


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
    entered = (mean + variance).isfinite().all()
    for running, batch in ((running_mean, mean), (running_var, variance)):
        running.copy_(torch.where(entered, running.lerp(batch, rate), running))
    if batches is not None:
        batches.add_(entered)
    return entered


Activation = str | Callable[[Tensor], Tensor] | None

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
