"""The native kernels on tensors: their addresses and layouts, and the results' memory.

`forward` and `backward` compute what `reference` does, for tensors on a CPU; see native/kernels.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

import batchnorm.kernels._native as _native
from batchnorm.kernels.layout import Layout, Strided
from batchnorm.kernels.reference import Given, groups

NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
Fused = tuple[int, float]  # an activation's number in the kernels, and its slope
NONE: Fused = (0, 0.0)
LEAKY_RELU = 2
FUSED: dict[str, Fused] = {"relu": (1, 0.0), "leaky_relu": (LEAKY_RELU, 0.01), "relu6": (3, 0.0)}

PerChannel = tuple[int, int]  # address, number of the dtype
_ABSENT: Strided = (0, 0, 0)
_DEFAULT: PerChannel = (0, 0)
_NOWHERE = (0, 0)


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
    """y = activation(bn(x) + residual), and the moments' mean and m2, (C,) float64.

    By the mean and the variance `given`, (C,) each, which then are what is returned, or else by the batch's own.
    With `group`, the samples of a group, every group has its own: (groups, C).
    """
    layout = Layout(x)
    y = torch.empty_like(x)
    x, of_x = layout.operand(x)
    out, of_y = layout.result(y)
    of_residual = _ABSENT
    if residual is not None:
        residual, of_residual = layout.operand(residual)
    weight, of_weight = _per_channel(weight)
    bias, of_bias = _per_channel(bias)
    if given is None:
        mean, m2 = _statistics(x, group), _statistics(x, group)
    else:
        mean, m2 = _dense(given[0]), _dense(given[1])
    _native.forward(
        layout.sizes, NUMBERS[x.dtype], of_x, of_residual, of_y, of_weight, of_bias, eps, *activation,
        _values(mean), _values(m2), given is not None, layout.rows(group), torch.get_num_threads(),
    )  # fmt: skip
    return (y if out is y else y.copy_(out)), mean, m2


def moments(x: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """The mean and m2 of each channel, and group, of `x`, as `forward` returns them."""
    layout = Layout(x)
    x, of_x = layout.operand(x)
    mean, m2 = _statistics(x, group), _statistics(x, group)
    _native.forward(
        layout.sizes, NUMBERS[x.dtype], of_x, _ABSENT, _ABSENT, _DEFAULT, _DEFAULT, 0.0, *NONE,
        _values(mean), _values(m2), False, layout.rows(group), torch.get_num_threads(),
    )  # fmt: skip
    return mean, m2


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
    averages: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `forward`: (dx, dweight, dbias, dresidual).

    `mean` and `m2` are what `forward` returned. `y` is its result where a residual was added before an activation, and
    only then is dresidual a tensor. dweight and dbias are (C,), of the dtype of weight and bias or else float64.

    averages: (2, C) or (2, groups, C), where the moments are of other values than x: the means of g and of g·x̂ over
        those. Then `mean` and `m2` are a mean and a variance, and dweight and dbias are not computed.
    """
    layout = Layout(x)
    dx = torch.empty_like(x)
    dresidual = None if y is None else torch.empty_like(x)
    x, of_x = layout.operand(x)
    dy, of_dy = layout.operand(dy if dy.dtype == x.dtype else dy.to(x.dtype))
    out, of_dx = layout.result(dx)
    residual_out, of_y, of_dresidual = None, _ABSENT, _ABSENT
    if y is not None and dresidual is not None:
        y, of_y = layout.operand(y)
        residual_out, of_dresidual = layout.result(dresidual)
    weight, of_weight = _per_channel(weight)
    bias, of_bias = _per_channel(bias)
    dweight, dbias = (_statistics(x, group) if group else gradient_of(values, x) for values in (weight, bias))
    _native.backward(
        layout.sizes, NUMBERS[x.dtype], of_dy, of_x, of_y, of_weight, of_bias, eps, *activation,
        _values(mean), _values(m2), given, of_dx, of_dresidual, _values(dweight), _values(dbias),
        _NOWHERE if averages is None else (averages[0].data_ptr(), averages[1].data_ptr()),
        layout.rows(group), torch.get_num_threads(),
    )  # fmt: skip
    if out is not dx:
        dx.copy_(out)
    if dresidual is not None and residual_out is not None and residual_out is not dresidual:
        dresidual.copy_(residual_out)
    if group:
        dweight, dbias = _summed(dweight, weight), _summed(dbias, bias)
    return dx, dweight, dbias, dresidual


def sums(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    activation: Fused,
    group: int = 0,
) -> Tensor:
    """(2, C) or (2, groups, C) float64: Σ g and Σ g·x̂ over x, by that mean and variance; the rest as `backward`."""
    layout = Layout(x)
    x, of_x = layout.operand(x)
    dy, of_dy = layout.operand(dy if dy.dtype == x.dtype else dy.to(x.dtype))
    of_y = _ABSENT
    if y is not None:
        y, of_y = layout.operand(y)
    weight, of_weight = _per_channel(weight)
    bias, of_bias = _per_channel(bias)
    found = x.new_empty((2, *mean.shape), dtype=torch.float64)
    _native.backward(
        layout.sizes, NUMBERS[x.dtype], of_dy, of_x, of_y, of_weight, of_bias, eps, *activation,
        _values(mean), _values(variance), True, _ABSENT, _ABSENT, _values(found[1]), _values(found[0]),
        _NOWHERE, layout.rows(group), torch.get_num_threads(),
    )  # fmt: skip
    return found


def trackable(mean: Tensor, running_mean: Tensor, running_var: Tensor, batches: Tensor | None) -> bool:
    """Whether `track` can move these towards `mean` and its m2."""
    return (
        mean.is_cpu
        and mean.dtype == torch.float64
        and running_mean.is_cpu
        and running_var.is_cpu
        and running_mean.dtype == running_var.dtype
        and running_mean.dtype in (torch.float32, torch.float64)
        and running_mean.is_contiguous()
        and running_var.is_contiguous()
        and (batches is None or (batches.dtype == torch.int64 and batches.is_cpu))
    )


def track(
    count: int,
    mean: Tensor,
    m2: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    rate: float,
    batches: Tensor | None = None,
) -> bool:
    """As functional.track, of moments on a CPU."""
    entered: bool = _native.track(
        mean.numel(), count, mean.data_ptr(), m2.data_ptr(), _values(running_mean), _values(running_var),
        rate, 0 if batches is None else batches.data_ptr(),
    )  # fmt: skip
    if entered and not running_mean.is_inference():
        # autograd must know: it may have saved them
        moved = (running_mean, running_var) if batches is None else (running_mean, running_var, batches)
        torch.autograd.graph.increment_version(moved)
    return entered


def total(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[int, Tensor, Tensor]:
    """The count, mean and m2 of parts that lie side by side: float64, (parts,) and (parts, C) of the same strides."""
    parts, channels = means.shape
    mean, m2 = means.new_empty(channels), means.new_empty(channels)
    count: float = _native.merge(
        parts, channels, counts.data_ptr(), counts.stride(0), means.data_ptr(), m2s.data_ptr(), means.stride(0),
        mean.data_ptr(), m2.data_ptr(),
    )  # fmt: skip
    return int(count), mean, m2


def gradient_of(values: Tensor | None, x: Tensor) -> Tensor:
    """Memory for the gradient of a weight or bias of x's layer, float64 where there is none."""
    return _statistics(x) if values is None else torch.empty_like(values)


def _statistics(x: Tensor, group: int = 0) -> Tensor:
    return x.new_empty((groups(x.size(0), group), x.size(1)) if group else x.size(1), dtype=torch.float64)


def _summed(of_groups: Tensor, values: Tensor | None) -> Tensor:
    """The gradient of `values` from those of the groups."""
    total = of_groups.sum(0)
    return total if values is None else total.to(values.dtype)


def _per_channel(values: Tensor | None) -> tuple[Tensor | None, PerChannel]:
    """`values`, or a copy of them that can be read, which the caller keeps alive."""
    if values is None:
        return None, _DEFAULT
    values = _dense(values)
    return values, _values(values)


def _dense(values: Tensor) -> Tensor:
    return values if values.is_contiguous() and not values.is_neg() else values.resolve_neg().contiguous()


def _values(values: Tensor) -> PerChannel:
    return values.data_ptr(), NUMBERS[values.dtype]
