"""The native kernels as operators of torch's dispatcher, for torch.compile and whoever else must see each call.

An operator costs twice what a node does; it may not write to its arguments, so running statistics are updated outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import native, triton_launches
from batchnorm.kernels.backward_graph import Gradients, backward_as_graph, select_needed
from batchnorm.kernels.call import NOT_FUSED, Call, Kernels
from batchnorm.kernels.reference import count, groups

# what an operator's kernel, its shapes and its gradient all end with
_SETTINGS = "float eps, int activation, float slope, int group=0"
_FORWARD = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? variance, "
    f"{_SETTINGS}) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor stats, bool given, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> Tensor:
    """As native.forward, as an operator."""
    # copies, as for a node
    mean, variance = (None, None) if call.fixed is None else (call.fixed[0].clone(), call.fixed[1].clone())
    y: Tensor
    y, stats = _forward(x, weight, bias, residual, mean, variance, call.eps, *call.fused, call.group)
    call.stats, call.count = stats, count(x, call.group)
    return y


def backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, call: Call
) -> Gradients:
    """As native.backward, as an operator."""
    stats = call.stats if call.fixed is None else torch.stack([values.double() for values in call.fixed])
    dx, dweight, dbias, dresidual = _backward(
        dy, x, y, weight, bias, stats, not call.training, call.eps, *call.fused, call.group
    )
    return dx, dweight, dbias, None if y is None else dresidual


def _kernels(x: Tensor) -> Kernels:
    """Those for the memory in which `x` is."""
    return native if x.is_cpu else triton_launches


def _call_of(
    fixed: bool, mean: Any, variance: Any, eps: float, activation: int, slope: float, group: int
) -> Call:
    """The Call that an operator's arguments describe."""
    call = Call(not fixed, eps, running_mean=mean, running_var=variance, group=group)
    call.fused = activation, slope
    return call


@torch.library.custom_op("batchnorm::forward", mutates_args=(), schema=_FORWARD)
def _forward(
    x: Tensor, weight: Any, bias: Any, residual: Any, mean: Any, variance: Any, *settings: Any
) -> tuple[Tensor, Tensor]:
    call = _call_of(mean is not None, mean, variance, *_with_group(settings))
    y = _kernels(x).forward(x, weight, bias, residual, call)
    if call.stats is None:
        return y, torch.stack([mean.double(), variance.double()])
    return y, call.stats


@_forward.register_fake
def _(x: Tensor, weight: Any, bias: Any, residual: Any, mean: Any, variance: Any, *settings: Any) -> Any:
    *_, group = _with_group(settings)
    of_groups = (groups(x.size(0), group),) if group else ()
    return torch.empty_like(x), x.new_empty((2, *of_groups, x.size(1)), dtype=torch.float64)


@torch.library.custom_op("batchnorm::backward", mutates_args=(), schema=_BACKWARD)
def _backward(
    dy: Tensor, x: Tensor, y: Any, weight: Any, bias: Any, stats: Tensor, given: bool, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _call_of(given, None, None, *_with_group(settings))
    if given:
        call.statistics = stats[0], stats[1]
    else:
        call.stats = stats
    dx, dweight, dbias, dresidual = _kernels(x).backward(dy, x, y, weight, bias, call)
    assert dx is not None and dweight is not None and dbias is not None
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


@_backward.register_fake
def _(dy: Tensor, x: Tensor, y: Any, weight: Any, bias: Any, *_: Any) -> Any:
    dresidual = x.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), native.gradient_of(weight, x), native.gradient_of(bias, x), dresidual


def _with_group(settings: tuple[Any, ...]) -> tuple[Any, ...]:
    """The settings of an operator; the dispatcher leaves out a group that is its default."""
    return settings if len(settings) == 4 else (*settings, 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, residual, mean, variance, *settings = inputs
    y, stats = output
    ctx.call = _call_of(mean is not None, None, None, *_with_group(tuple(settings)))
    ctx.number_of_inputs = len(inputs)
    ctx.mark_non_differentiable(stats)
    if residual is None or ctx.call.fused == NOT_FUSED:  # see node.Normalise
        ctx.save_for_backward(x, weight, bias, None, None, mean, variance, stats)
    else:
        ctx.save_for_backward(x, weight, bias, residual, y, mean, variance, stats)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, y, mean, variance, stats = ctx.saved_tensors
    call, needed = ctx.call, ctx.needs_input_grad[:4]
    rest = [None] * (ctx.number_of_inputs - 4)
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        call.statistics = None if call.training else (mean, variance)
        return *backward_as_graph(dy, x, weight, bias, residual, call, needed), *rest
    dx, dweight, dbias, dresidual = _backward(
        dy, x, y, weight, bias, stats, not call.training, call.eps, *call.fused, call.group
    )
    return *select_needed(needed, (dx, dweight, dbias, dy if y is None else dresidual)), *rest


torch.library.register_autograd("batchnorm::forward", _differentiate, setup_context=_save)
