"""The native kernels, or Triton's, step by step, where a batch is not normalised by its own moments alone.

moments, an exchange with others, normalise  ·  going back: Σ g and Σ g·x̂, an exchange, the gradient of x
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels import native, reference
from batchnorm.kernels.backward_graph import Gradients
from batchnorm.kernels.call import Call, Kernels
from batchnorm.kernels.padding import Padding
from batchnorm.moments import Moments


def kernels_of(call: Call) -> Kernels:
    """Those that compute `call`."""
    return native if call.kernels is None else call.kernels


def own_moments(
    x: Tensor, padding: Padding | None = None, group: int = 0, kernels: Kernels = native
) -> Moments:
    """Those of the values of `x` themselves, in which `padding` is filled already."""
    if x.numel() == 0:
        zeros = x.new_zeros(x.size(1), dtype=torch.float64)
        per_channel = padding is not None and padding.valid.dim() > 0  # as on ranks that have values
        return Moments(zeros.long() if per_channel else 0, zeros, zeros)
    if padding is not None and padding.dominates(x):
        return reference.moments(x, padding.mask, group)
    mean, m2 = kernels.moments(x, group)
    whole = Moments(reference.count(x, group), mean, m2)
    return whole if padding is None else padding.remove_from(whole)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> Tensor:
    """As native.forward, by moments that are not those of all values of `x` alone."""

    def own() -> Moments:
        return own_moments(x, call.padding, call.group, kernels_of(call))

    moments = own() if call.exchange is None else call.exchange.moments(own)
    call.moments, call.statistics = moments, reference.mean_and_variance(moments)
    return kernels_of(call).forward(x, weight, bias, residual, call) if x.numel() else torch.empty_like(x)


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    call: Call,
    needed: tuple[bool, ...],
) -> Gradients:
    """As native.backward, where the sums over the batch are exchanged before the gradient of x is taken."""
    moments = call.moments
    assert moments is not None and call.statistics is not None
    kernels = kernels_of(call)
    empty = x.numel() == 0
    exchanged = call.padding is not None or (call.exchange is not None and call.exchange.others)
    if not exchanged and not empty:
        return kernels.backward(dy, x, y, weight, bias, call, (moments.mean, moments.m2))
    own = (
        x.new_zeros(2, x.size(1), dtype=torch.float64)
        if empty
        else kernels.sums(dy, x, y, weight, bias, call)
    )
    dbias, dweight = own.sum(1) if own.dim() == 3 else own
    dx: Tensor | None = None
    dresidual: Tensor | None = None
    if needed[0] or (needed[3] and y is not None):
        total = own if call.exchange is None else call.exchange.sums(own)
        averages = total / torch.as_tensor(moments.count).clamp(min=1)
        if empty:
            dx = torch.empty_like(x)
        else:
            dx, _, _, dresidual = kernels.backward(dy, x, y, weight, bias, call, call.statistics, averages)
    return (
        dx,
        dweight if weight is None else dweight.to(weight.dtype),
        dbias if bias is None else dbias.to(bias.dtype),
        dresidual,
    )
