"""The native kernels as one node of the autograd graph, which saves x and 2·C numbers for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import native, operators
from batchnorm.kernels.graph import again, asked, saved_of
from batchnorm.kernels.native import Fused
from batchnorm.kernels.observers import needs_dispatcher
from batchnorm.kernels.reference import Given


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Fused,
    given: Given | None,
    group: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As native.forward, differentiable."""
    if given is not None:  # a copy, for the node keeps it and a later batch moves the buffer
        given = given[0].clone(), given[1].clone()
    call = _Call(eps, activation, given, group)
    y: Tensor = _Normalise.apply(x, weight, bias, residual, call)
    return y, call.mean, call.m2


class _Call:
    """What a call is beside its tensors, and the moments that come back."""

    __slots__ = ("activation", "eps", "given", "group", "m2", "mean")

    mean: Tensor
    m2: Tensor

    def __init__(self, eps: float, activation: Fused, given: Given | None, group: int) -> None:
        self.eps, self.activation, self.given, self.group = eps, activation, given, group


# forward(ctx, ...) and not setup_context, which costs 60 µs a call
class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: _Call
    ) -> Tensor:
        y, call.mean, call.m2 = native.forward(
            x, weight, bias, residual, call.eps, call.activation, call.given, call.group
        )
        ctx.call = call
        ctx.save_for_backward(x, weight, bias, *saved_of(y, residual, call.activation))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        x, weight, bias, residual, y = ctx.saved_tensors
        needed = ctx.needs_input_grad
        # a gradient of this gradient is asked for, or dy is a batch of gradients under vmap
        if torch.is_grad_enabled() or not torch._C._has_storage(dy):
            found = again(
                dy, x, weight, bias, residual, call.eps, call.activation, call.given, needed[:4], call.group
            )
            return *found, None
        backward = operators.backward if needs_dispatcher(dy) else native.backward
        dx, dweight, dbias, dresidual = backward(
            dy,
            x,
            y,
            weight,
            bias,
            call.mean,
            call.m2,
            call.given is not None,
            call.eps,
            call.activation,
            call.group,
        )
        return *asked(needed, dx, dweight, dbias, dy if dresidual is None else dresidual), None
