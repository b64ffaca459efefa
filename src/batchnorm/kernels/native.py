"""The native kernels on tensors: their addresses and layouts, and the results' memory.

`forward` and `backward` compute what `reference` does, for tensors on a CPU; see native/kernels.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

import batchnorm.kernels._native as _native
from batchnorm.kernels.backward_graph import Gradients
from batchnorm.kernels.call import NOT_FUSED, Call, FixedStatistics, Fused
from batchnorm.kernels.layout import Strided, layout_of
from batchnorm.kernels.reference import count, groups

NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
LEAKY_RELU = 2
_CPU = torch.device("cpu")  # which may not be torch's default
FUSED: dict[str, Fused] = {"relu": (1, 0.0), "leaky_relu": (LEAKY_RELU, 0.01), "relu6": (3, 0.0)}

PerChannel = tuple[int, int]  # address, number of the dtype
_ABSENT: Strided = (0, 0, 0)
_DEFAULT: PerChannel = (0, 0)
_NOWHERE = (0, 0)
# Where torch offers DLPack's exchange API, C++ reads dense tensors itself: a small layer's step takes an eighth less.
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_READS_TENSORS = _EXCHANGE is not None and _native.use_exchange(_EXCHANGE)
Tracked = tuple[PerChannel, PerChannel, float, int]  # running mean and variance, rate, address of the counter
_NOT_TRACKED: Tracked = (_DEFAULT, _DEFAULT, 0.0, 0)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> Tensor:
    """y = activation(bn(x) + residual), by `call.statistics` or else by the moments of x, which go to `call.stats`.

    With `call.group`, the samples of a group, every group has its own. Where the running statistics can be updated by
    the same native call, they are. Moments that are in `call.stats` already are those that an earlier call found of x:
    they give the same bits, as their quotient would not, whose rounding comes before that of the sum with eps.
    """
    y = torch.empty_like(x)
    again = call.stats is not None
    dense = _READS_TENSORS and call.statistics is None and not again and residual is None and not call.group
    if dense and _forward_dense(x, y, weight, bias, call):
        return y
    layout, group = layout_of(x), call.group
    x, of_x = layout.operand(x)
    out, of_y = layout.result(y)
    of_residual = _ABSENT
    if residual is not None:
        residual, of_residual = layout.operand(residual)
    weight, of_weight = _per_channel(weight)
    bias, of_bias = _per_channel(bias)
    tracked = _NOT_TRACKED
    known = call.statistics
    if call.stats is not None:
        mean, m2 = _addresses(call.stats)
    elif known is None:
        found = call.stats = _stats(x, group)
        outer, _, inner = layout.sizes
        call.count = count(x, group) if group else outer * inner
        mean, m2 = _addresses(found)
        if call.updates_inline:
            tracked = _tracked(call)
    else:
        known = _dense(known[0]), _dense(known[1])
        mean, m2 = _addresses(known)
    entered = _native.forward(
        layout.sizes, NUMBERS[x.dtype], of_x, of_residual, of_y, of_weight, of_bias, call.eps, *call.fused,
        mean, m2, 1 if known is not None else 2 if again else 0, layout.rows(group) if group else 0, tracked,
        torch.get_num_threads(),
    )  # fmt: skip
    if tracked is not _NOT_TRACKED:
        call.updated = entered
        if entered:
            _mark_changed(call)
    return y if out is y else y.copy_(out)


def _forward_dense(x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call) -> bool:
    """`forward` into `y` by the moments of x, if all tensors are dense; else False, and nothing is done."""
    if x.is_neg() or (weight is not None and weight.is_neg()) or (bias is not None and bias.is_neg()):
        return False
    mean, var, batches, rate = call.running_mean, call.running_var, call.batches, call.rate
    tracked = call.updates_inline and type(mean) is Tensor and type(var) is Tensor and rate is not None
    stats = _stats(x)
    number, slope = call.fused
    if tracked and rate is not None:
        found = _native.forward_dense(
            x, y, weight, bias, stats, mean, var, batches, float(rate), call.eps, number, slope,
            torch.get_num_threads(),
        )  # fmt: skip
    else:
        found = _native.forward_dense(
            x, y, weight, bias, stats, None, None, None, 0.0, call.eps, number, slope, torch.get_num_threads()
        )
    if found is None:
        return False
    call.stats = stats
    call.count, entered = found
    if tracked:
        call.updated = entered
        if entered:
            _mark_changed(call)
    return True


def moments(x: Tensor, group: int = 0) -> Tensor:
    """The mean and m2 of each channel, and group, of `x`: (2, C) or (2, groups, C) float64."""
    layout = layout_of(x)
    x, of_x = layout.operand(x)
    found = _stats(x, group)
    _native.forward(
        layout.sizes, NUMBERS[x.dtype], of_x, _ABSENT, _ABSENT, _DEFAULT, _DEFAULT, 0.0, *NOT_FUSED,
        *_addresses(found), 0, layout.rows(group), _NOT_TRACKED, torch.get_num_threads(),
    )  # fmt: skip
    return found


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    call: Call,
    statistics: Tensor | FixedStatistics | None = None,
    averages: Tensor | None = None,
) -> Gradients:
    """The gradients of `forward`: (dx, dweight, dbias, dresidual).

    `y` is its result where a residual was added before an activation, and only then is dresidual a tensor. dweight and
    dbias are (C,), of the dtype of weight and bias or else float64.

    statistics: mean and m2, where they are not those that `call` holds.
    averages: (2, C) or (2, groups, C), where the moments are of other values than x: the means of g and of g·x̂ over
        those. Then `statistics` are a mean and a variance, and dweight and dbias are not computed.
    """
    if _READS_TENSORS and y is None and statistics is None and call.stats is not None and not call.group:
        dense = _backward_dense(dy, x, weight, bias, call)
        if dense is not None:
            return dense
    group, constant = call.group, not call.training
    if statistics is None:
        statistics = call.statistics if constant else call.stats
        assert statistics is not None
    layout = layout_of(x)
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
    if group:
        dweight, dbias = _stats(x, group)
    else:
        dweight = gradient_of(None, x) if weight is None else torch.empty_like(weight)
        dbias = gradient_of(None, x) if bias is None else torch.empty_like(bias)
    _native.backward(
        layout.sizes, NUMBERS[x.dtype], of_dy, of_x, of_y, of_weight, of_bias, call.eps, *call.fused,
        *_addresses(statistics), constant, of_dx, of_dresidual,
        (dweight.data_ptr(), NUMBERS[dweight.dtype]), (dbias.data_ptr(), NUMBERS[dbias.dtype]),
        _NOWHERE if averages is None else (averages[0].data_ptr(), averages[1].data_ptr()),
        layout.rows(group) if group else 0, torch.get_num_threads(),
    )  # fmt: skip
    if out is not dx:
        dx.copy_(out)
    if dresidual is not None and residual_out is not None and residual_out is not dresidual:
        dresidual.copy_(residual_out)
    if group:
        dweight, dbias = _summed(dweight, weight), _summed(dbias, bias)
    return dx, dweight, dbias, dresidual


def _backward_dense(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call
) -> Gradients | None:
    """`backward` of what `_forward_dense` did; None where the tensors are not dense."""
    if dy.is_neg() or x.is_neg():
        return None
    if (weight is not None and weight.is_neg()) or (bias is not None and bias.is_neg()):
        return None
    dx = torch.empty_like(x)
    dweight = gradient_of(None, x) if weight is None else torch.empty_like(weight)
    dbias = gradient_of(None, x) if bias is None else torch.empty_like(bias)
    number, slope = call.fused
    done = _native.backward_dense(
        dy, x, weight, bias, call.stats, dx, dweight, dbias, call.eps, number, slope, torch.get_num_threads()
    )
    return (dx, dweight, dbias, None) if done else None


def sums(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, call: Call
) -> Tensor:
    """(2, C) or (2, groups, C) float64: Σ g and Σ g·x̂ over x, by the call's mean and variance; as `backward`."""
    known = call.statistics
    assert known is not None
    layout = layout_of(x)
    x, of_x = layout.operand(x)
    dy, of_dy = layout.operand(dy if dy.dtype == x.dtype else dy.to(x.dtype))
    of_y = _ABSENT
    if y is not None:
        y, of_y = layout.operand(y)
    weight, of_weight = _per_channel(weight)
    bias, of_bias = _per_channel(bias)
    found = x.new_empty((2, *known[0].shape), dtype=torch.float64)
    dbias, dweight = _addresses(found)
    _native.backward(
        layout.sizes, NUMBERS[x.dtype], of_dy, of_x, of_y, of_weight, of_bias, call.eps, *call.fused,
        *_addresses(known), True, _ABSENT, _ABSENT, dweight, dbias,
        _NOWHERE, layout.rows(call.group), torch.get_num_threads(),
    )  # fmt: skip
    return found


def track(call: Call, mean: Tensor, m2: Tensor, number: int) -> bool | None:
    """As functional.track, of moments on a CPU; None where a native call cannot update the running statistics."""
    tracked = _tracked(call)
    if tracked is _NOT_TRACKED:
        return None
    entered: bool = _native.track(mean.numel(), number, mean.data_ptr(), m2.data_ptr(), tracked)
    if entered:
        _mark_changed(call)
    return entered


def track_unbiased(call: Call, mean: Tensor, variance: Tensor, number: int) -> bool | None:
    """The same, of a mean and an unbiased variance, float32 or float64."""
    tracked = _tracked(call)
    if tracked is _NOT_TRACKED:
        return None
    entered: bool = _native.track_unbiased(mean.numel(), number, _values(mean), _values(variance), tracked)
    if entered:
        _mark_changed(call)
    return entered


def total(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[int, Tensor, Tensor]:
    """The count, mean and m2 of parts that lie side by side: float64, (parts,) and (parts, C) of the same strides."""
    parts, channels = means.shape
    mean, m2 = means.new_empty(channels), means.new_empty(channels)
    merged: float = _native.merge(
        parts, channels, counts.data_ptr(), counts.stride(0), means.data_ptr(), m2s.data_ptr(), means.stride(0),
        mean.data_ptr(), m2.data_ptr(),
    )  # fmt: skip
    return int(merged), mean, m2


def gradient_of(values: Tensor | None, x: Tensor) -> Tensor:
    """Memory for the gradient of a weight or bias of x's layer, float64 where there is none."""
    return x.new_empty(x.size(1), dtype=torch.float64) if values is None else torch.empty_like(values)


def _stats(x: Tensor, group: int = 0) -> Tensor:
    """Memory for two float64 of each channel, and group: one allocation."""
    shape = (2, groups(x.size(0), group), x.size(1)) if group else (2, x.size(1))
    return torch.empty(shape, dtype=torch.float64, device=_CPU)


def _addresses(statistics: Tensor | FixedStatistics) -> tuple[PerChannel, PerChannel]:
    """Those of the two halves of a tensor of `_stats`, or of two tensors."""
    if isinstance(statistics, Tensor):
        address = statistics.data_ptr()
        return (address, 1), (address + 4 * statistics.numel(), 1)  # half of so many float64
    first, second = statistics
    return _values(first), _values(second)


def _tracked(call: Call) -> Tracked:
    """The running statistics of `call`, or none where a native call cannot update them."""
    mean, var, batches = call.running_mean, call.running_var, call.batches
    if type(mean) is not Tensor or type(var) is not Tensor or call.rate is None:
        return _NOT_TRACKED
    number = NUMBERS.get(mean.dtype, -1)
    if number > 1 or number < 0 or var.dtype != mean.dtype or not (mean.is_cpu and var.is_cpu):
        return _NOT_TRACKED
    if not (mean.is_contiguous() and var.is_contiguous()):
        return _NOT_TRACKED
    counter = 0
    if batches is not None:
        if batches.dtype != torch.int64 or not batches.is_cpu:
            return _NOT_TRACKED
        counter = batches.data_ptr()
    return (mean.data_ptr(), number), (var.data_ptr(), number), float(call.rate), counter


def _mark_changed(call: Call) -> None:
    """Tell autograd, which may have saved them, that the running statistics have changed."""
    mean, var, batches = call.running_mean, call.running_var, call.batches
    assert mean is not None and var is not None
    if not mean.is_inference():
        torch.autograd.graph.increment_version((mean, var) if batches is None else (mean, var, batches))


def _summed(of_groups: Tensor, values: Tensor | None) -> Tensor:
    """The gradient of `values` from those of the groups."""
    total = of_groups.sum(0)
    return total if values is None else total.to(values.dtype)


def _per_channel(values: Tensor | None) -> tuple[Tensor | None, PerChannel]:
    """`values`, or a copy of them that can be read, which the caller keeps alive."""
    if values is None:
        return None, _DEFAULT
    if not values.is_contiguous() or values.is_neg():
        values = _dense(values)
    return values, (values.data_ptr(), NUMBERS[values.dtype])


def _dense(values: Tensor) -> Tensor:
    return values if values.is_contiguous() and not values.is_neg() else values.resolve_neg().contiguous()


def _values(values: Tensor) -> PerChannel:
    return values.data_ptr(), NUMBERS[values.dtype]
