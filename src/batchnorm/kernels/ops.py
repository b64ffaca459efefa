"""The op: batch normalization by the batch's own moments, as one node of the autograd graph.

A node of its own, and not torch's record of the reference's steps, because it saves x and 2·C numbers
for the backward pass, where the record would keep two tensors of x's size in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.moments import Moments, count_per_channel


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Moments]:
    """Normalise `x`, (N, C, *S), by its own moments; return the output and those moments (detached)."""
    # torch.func's transforms and forward-mode gradients need every step, not one node
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        moments = reference.moments(x)
        y = reference.normalise(x, moments, weight, bias, eps)
        return y, Moments(moments.count, moments.mean.detach(), moments.m2.detach())
    y, mean, m2 = _Normalise.apply(x, weight, bias, eps)
    return y, Moments(count_per_channel(x), mean, m2)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        moments = reference.moments(x)
        y = reference.normalise(x, moments, weight, bias, eps)
        ctx.eps = eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(moments.mean, moments.m2)
        ctx.save_for_backward(x, weight, moments.mean, moments.m2)
        return y, moments.mean, moments.m2

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, m2 = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted: the moments depend on x, so let autograd see how.
            moments = reference.moments(x)
        else:
            moments = Moments(count_per_channel(x), mean, m2)
        dx, dweight, dbias = reference.backward(dy, x, moments, weight, ctx.eps)
        return (
            dx if ctx.needs_input_grad[0] else None,
            dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            dbias.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
            None,
        )
