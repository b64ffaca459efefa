"""The native kernels step by step, where a batch is not normalised by its own moments alone.

moments, an exchange with others, normalise  ·  going back: Σ g and Σ g·x̂, an exchange, the gradient of x
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import native, reference
from batchnorm.kernels.graph import again, asked, saved_of
from batchnorm.kernels.native import Fused
from batchnorm.kernels.padding import Padding
from batchnorm.kernels.reference import Exchange, Given
from batchnorm.moments import Moments


def own_moments(x: Tensor, padding: Padding | None = None, group: int = 0) -> Moments:
    """Those of the values of `x` themselves, in which `padding` is filled already."""
    if x.numel() == 0:
        nothing = x.new_zeros(x.size(1), dtype=torch.float64)
        each = padding is not None and padding.valid.dim() > 0  # other ranks have a count for each channel
        return Moments(nothing.long() if each else 0, nothing, nothing)
    if padding is not None and padding.prevails(x):
        return reference.moments(x, padding.mask, group)
    mean, m2 = native.moments(x, group)
    whole = Moments(reference.count(x, group), mean, m2)
    return whole if padding is None else padding.taken_out_of(whole)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Fused,
    group: int,
    padding: Padding | None,
    exchange: Exchange | None,
) -> tuple[Tensor, Moments]:
    """As node.forward, by moments that are not those of all values of `x` alone; and these."""
    call = _Call(eps, activation, group, padding, exchange)
    y: Tensor = _Normalise.apply(x, weight, bias, residual, call)
    return y, call.moments


class _Call:
    """What a joint call is beside its tensors, and the moments that come back."""

    __slots__ = ("activation", "eps", "exchange", "given", "group", "moments", "padding")

    moments: Moments
    given: Given

    def __init__(
        self,
        eps: float,
        activation: Fused,
        group: int,
        padding: Padding | None,
        exchange: Exchange | None,
    ) -> None:
        self.eps, self.activation, self.group = eps, activation, group
        self.padding, self.exchange = padding, exchange

    @property
    def of_its_own(self) -> bool:
        """Whether the moments are those of all values of the input, and of no others."""
        return self.padding is None and (self.exchange is None or not self.exchange.others)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: _Call
    ) -> Tensor:
        def own() -> Moments:
            return own_moments(x, call.padding, call.group)

        call.moments = own() if call.exchange is None else call.exchange.moments(own)
        call.given = reference.mean_and_variance(call.moments)
        y = torch.empty_like(x)
        if x.numel():
            y, _, _ = native.forward(
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
        eps, activation, group = call.eps, call.activation, call.group
        if torch.is_grad_enabled() or not torch._C._has_storage(dy):
            mask = None if call.padding is None else call.padding.mask
            found = again(
                dy, x, weight, bias, residual, eps, activation, None, needed[:4], group, mask, call.exchange
            )
            return *found, None
        dx: Tensor | None = None
        dresidual: Tensor | None = None
        empty = x.numel() == 0
        if call.of_its_own and not empty:
            dx, dweight, dbias, dresidual = native.backward(
                dy, x, y, weight, bias, call.moments.mean, call.moments.m2, False, eps, activation, group
            )
            return *asked(needed, dx, dweight, dbias, dy if dresidual is None else dresidual), None
        own = (
            x.new_zeros(2, x.size(1), dtype=torch.float64)
            if empty
            else native.sums(dy, x, y, weight, bias, *call.given, eps, activation, group)
        )
        dbias, dweight = own.sum(1) if own.dim() == 3 else own
        if needed[0] or (needed[3] and y is not None):
            total = own if call.exchange is None else call.exchange.sums(own)
            averages = total / torch.as_tensor(call.moments.count).clamp(min=1)
            if empty:
                dx = torch.empty_like(x)
            else:
                dx, _, _, dresidual = native.backward(
                    dy, x, y, weight, bias, *call.given, False, eps, activation, group, averages
                )
        return *asked(
            needed,
            dx,
            dweight if weight is None else dweight.to(weight.dtype),
            dbias if bias is None else dbias.to(bias.dtype),
            dy if dresidual is None else dresidual,
        ), None
