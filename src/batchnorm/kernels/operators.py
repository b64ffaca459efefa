"""The native kernels as operators of torch's dispatcher, for torch.compile and whoever else must see each call.

An operator costs twice what a node does; it may not write to its arguments, so running statistics are moved outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import native
from batchnorm.kernels.graph import again, asked, saved_of
from batchnorm.kernels.native import Fused
from batchnorm.kernels.reference import Given, groups


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
    """As native.forward, as an operator."""
    # copies, as in a node
    mean, variance = (None, None) if given is None else (given[0].clone(), given[1].clone())
    y, stats = _forward(x, weight, bias, residual, mean, variance, eps, *activation, group)
    return y, stats[0], stats[1]


@torch.library.custom_op("batchnorm::forward", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
    group: int = 0,
) -> tuple[Tensor, Tensor]:
    given = None if mean is None or variance is None else (mean, variance)
    y, *stats = native.forward(x, weight, bias, residual, eps, (activation, slope), given, group)
    return y, torch.stack([values.double() for values in stats])


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
    group: int = 0,
) -> tuple[Tensor, Tensor]:
    of_groups = (groups(x.size(0), group),) if group else ()
    return torch.empty_like(x), x.new_empty((2, *of_groups, x.size(1)), dtype=torch.float64)


@torch.library.custom_op("batchnorm::backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    given: bool,
    eps: float,
    activation: int,
    slope: float,
    group: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, dbias, dresidual = native.backward(
        dy, x, y, weight, bias, stats[0], stats[1], given, eps, (activation, slope), group
    )
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    given: bool,
    eps: float,
    activation: int,
    slope: float,
    group: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = x.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), native.gradient_of(weight, x), native.gradient_of(bias, x), dresidual


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    m2: Tensor,
    given: bool,
    eps: float,
    activation: Fused,
    group: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As native.backward, as an operator."""
    stats = torch.stack([mean.double(), m2.double()])
    dx, dweight, dbias, dresidual = _backward(dy, x, y, weight, bias, stats, given, eps, *activation, group)
    return dx, dweight, dbias, None if y is None else dresidual


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, residual, mean, variance, ctx.eps, activation, slope, ctx.group = inputs
    y, stats = output
    ctx.activation, ctx.given = (activation, slope), mean is not None
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(x, weight, bias, *saved_of(y, residual, ctx.activation), mean, variance, stats)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, y, mean, variance, stats = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        given = (mean, variance) if ctx.given else None
        found = again(dy, x, weight, bias, residual, ctx.eps, ctx.activation, given, wanted, ctx.group)
        return *found, *[None] * 6
    dx, dweight, dbias, dresidual = _backward(
        dy, x, y, weight, bias, stats, ctx.given, ctx.eps, *ctx.activation, ctx.group
    )
    return *asked(wanted, dx, dweight, dbias, dy if y is None else dresidual), *[None] * 6


torch.library.register_autograd("batchnorm::forward", _differentiate, setup_context=_save)
