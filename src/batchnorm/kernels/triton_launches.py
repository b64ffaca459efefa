"""The kernels in Triton on tensors, as `native` is those in C++: what is launched, and the results' memory.

    forward    moments of parts · merged, and whether they are finite · normalise, and move the running statistics
    backward   sums of parts · merged · gradient of x

Nothing waits for the device, and nothing is accumulated in an order that can vary: results are bit-identical.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.kernels.call import Call, FixedStatistics
from batchnorm.kernels.reference import count
from batchnorm.kernels.tiling import Tiling, tiling

if TYPE_CHECKING:
    from types import ModuleType

    from batchnorm.kernels.backward_graph import Gradients

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_KEPT = (torch.float32, torch.float64)  # dtypes of running statistics that a kernel moves
_PARTS = 128  # that are merged at a time
_COLUMNS = 8  # channels that a program merges
_MERGING_WARPS = 4


def supports(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> bool:
    """Whether `forward`, and then `backward`, can do what `call` says; its exchange and padding are the caller's."""
    return (
        usable(x.device)
        and x.dtype in _DTYPES
        and x.dim() >= 2
        and x.numel() > 0
        and all(
            values is None or (values.device == x.device and values.dtype in _DTYPES)
            for values in (weight, bias, *(call.statistics or ()))
        )
        and (residual is None or (residual.shape == x.shape and residual.device == x.device))
        and tiling(x.shape, x.stride(), call.group).small_enough
    )


@cache
def usable(device: torch.device) -> bool:
    """Whether kernels in Triton run on `device`."""
    if find_spec("triton") is None:
        return False
    if device.type == "cpu":  # Triton's interpreter
        return bool(_kernels().INTERPRETED)
    # bfloat16 needs the instructions of an A100
    return device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    )


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> Tensor:
    """As native.forward, but that `call.skipped` is counted, too.

    Then `call.updated` is True; else a tensor, where running statistics were to be updated.
    """
    walk = tiling(x.shape, x.stride(), call.group)
    y = torch.empty_like(x)
    x = walk.dense(x)
    tracked, entered = False, None
    if call.statistics is None and call.stats is None:
        tracked = call.updates_inline and _can_follow(call, x)
        entered = torch.empty((), dtype=torch.int8, device=x.device) if tracked else None
        call.stats = _moments(x, walk, call.group, call.running_mean, entered)
        call.count = count(x, call.group) if call.group else x.numel() // x.size(1)
    known = call.stats is None
    statistics = call.statistics if call.stats is None else call.stats
    assert statistics is not None
    mean, spread = map(_contiguous, statistics)
    rate = call.rate if tracked else None
    skipped = call.skipped if tracked and _is_counter(call.skipped, x) else None
    running = (call.running_mean, call.running_var, call.batches) if tracked else (None, None, None)
    out = y if y.stride() == walk.stride else walk.empty(y)
    _launch(
        _kernels().normalise, walk, x.device,
        x, None if residual is None else walk.dense(residual), out, _contiguous(weight), _contiguous(bias),
        mean, spread, *running, skipped, entered,
        rate if isinstance(rate, Tensor) else None, 0.0 if rate is None or isinstance(rate, Tensor) else float(rate),
        float(call.eps), *_sizes(walk), KNOWN=known, ACTIVATION=call.fused[0], SLOPE=call.fused[1],
        **_shape(walk, x.dtype),
    )  # fmt: skip
    if entered is not None:
        call.updated = entered.view(torch.bool) if skipped is None else True
        _mark_changed(call)
    return y if out is y else y.copy_(out)


def moments(x: Tensor, group: int = 0) -> Tensor:
    """As native.moments."""
    walk = tiling(x.shape, x.stride(), group)
    return _moments(walk.dense(x), walk, group)


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
    """As native.backward, but that `dy` may be of another dtype."""
    constant = not call.training
    if statistics is None:
        statistics = call.statistics if constant else call.stats
        assert statistics is not None
    walk = tiling(x.shape, x.stride(), call.group)
    dx = torch.empty_like(x)
    dresidual = None if y is None else torch.empty_like(x)
    same = dx.stride() == walk.stride
    out = dx if same else walk.empty(dx)
    residual_out = dresidual if same or dresidual is None else walk.empty(dresidual)
    operands = walk.dense(dy), walk.dense(x), None if y is None else walk.dense(y)
    per_channel = _contiguous(weight), _contiguous(bias), *(_contiguous(each) for each in statistics)
    known = constant or averages is not None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    if averages is None:
        dweight, dbias = gradient_of(weight, x), gradient_of(bias, x)
        written = (out, residual_out) if constant else (None, None)
        sums = _sums(walk, operands, per_channel, call, known, written, (dweight, dbias))
        if walk.groups > 1:
            dbias.copy_(sums[0].sum(0))
            dweight.copy_(sums[1].sum(0))
    if not constant:
        given = sums if averages is None else averages.to(torch.float64).contiguous()
        _launch(
            _kernels().gradients, walk, x.device, *operands, out, residual_out, *per_channel, given, float(call.eps),
            *_sizes(walk), SUMS=averages is None, **_settings(call, known, operands, walk),
        )  # fmt: skip
    if not same:
        dx.copy_(out)
        if dresidual is not None and residual_out is not None:
            dresidual.copy_(residual_out)
    return dx, dweight, dbias, dresidual


def sums(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, call: Call
) -> Tensor:
    """As native.sums."""
    known = call.statistics
    assert known is not None
    walk = tiling(x.shape, x.stride(), call.group)
    operands = walk.dense(dy), walk.dense(x), None if y is None else walk.dense(y)
    per_channel = _contiguous(weight), _contiguous(bias), *(_contiguous(each) for each in known)
    return _sums(walk, operands, per_channel, call, True)


def gradient_of(values: Tensor | None, x: Tensor) -> Tensor:
    """As native.gradient_of."""
    return x.new_empty(x.size(1), dtype=torch.float64) if values is None else torch.empty_like(values)


def _moments(
    x: Tensor, walk: Tiling, group: int, running_mean: Tensor | None = None, entered: Tensor | None = None
) -> Tensor:
    """Those of `x`, which is dense; and, unless it is None, `entered`: whether all are finite as running statistics."""
    numbers = walk.groups * walk.channels
    found = x.new_empty((walk.parts, 3, numbers), dtype=torch.float64)
    stats = x.new_empty((2, walk.groups, walk.channels), dtype=torch.float64)
    _launch(
        _kernels().moments_of_parts, walk, x.device, x, found, entered, *_sizes(walk), **_shape(walk, x.dtype)
    )
    kept = None if entered is None else running_mean
    _merge(_kernels().merge_moments, found, x.device, found, stats, kept, entered, walk.parts, numbers)
    return stats if group else stats.flatten(1)


def _sums(
    walk: Tiling,
    operands: tuple[Tensor, Tensor, Tensor | None],
    per_channel: tuple[Tensor | None, ...],
    call: Call,
    known: bool,
    written: tuple[Tensor | None, Tensor | None] = (None, None),
    rounded: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Σ g and Σ g·x̂, as `sums`; also `rounded` to dweight and dbias, and dx and dresidual `written` by the way."""
    x, numbers = operands[1], walk.groups * walk.channels
    found = x.new_empty((walk.parts, 2, numbers), dtype=torch.float64)
    total = x.new_empty((2, walk.groups, walk.channels), dtype=torch.float64)
    _launch(
        _kernels().sums_of_parts, walk, x.device, *operands, *written, *per_channel, found, float(call.eps),
        *_sizes(walk), **_settings(call, known, operands, walk),
    )  # fmt: skip
    dweight, dbias = (None, None) if rounded is None or walk.groups > 1 else rounded
    _merge(
        _kernels().merge_sums, found, x.device, found, total, dweight, dbias, *per_channel[2:], float(call.eps),
        walk.channels, *walk.counts, walk.parts, numbers, KNOWN=known, WIDE=_kernels().WIDE[x.dtype],
    )  # fmt: skip
    return total if call.group else total.flatten(1)


def _launch(kernel: Any, walk: Tiling, device: torch.device, *arguments: Any, **constants: Any) -> None:
    _start(kernel, walk.programs, device, arguments, constants | {"num_warps": walk.warps})


def _merge(kernel: Any, found: Tensor, device: torch.device, *arguments: Any, **constants: Any) -> None:
    blocks = -(-found.size(2) // _COLUMNS)
    parts = min(_PARTS, 1 << max(0, found.size(0) - 1).bit_length())
    _start(
        kernel, (blocks, 1), device, arguments,
        constants | {"PARTS": parts, "COLUMNS": _COLUMNS, "num_warps": _MERGING_WARPS},
    )  # fmt: skip


def _start(
    kernel: Any, grid: tuple[int, int], device: torch.device, arguments: Any, constants: dict[str, Any]
) -> None:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **constants)
    else:
        with torch.cuda.device(device):  # Triton launches on the current one
            kernel[grid](*arguments, **constants)


def _sizes(walk: Tiling) -> tuple[int, ...]:
    return (
        walk.lines, walk.channels, walk.width // walk.step, walk.group_lines, walk.groups, walk.tiles_per_part,
    )  # fmt: skip


def _shape(walk: Tiling, dtype: torch.dtype) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {
        "STEP": walk.step,
        "ROWS": walk.rows,
        "LINES": walk.tile[0],
        "COLUMNS": walk.tile[1],
        "WIDE": _kernels().WIDE[dtype],
    }


def _settings(call: Call, known: bool, operands: tuple[Tensor, Tensor, Tensor | None], walk: Tiling) -> Any:
    number, slope = call.fused
    return {
        "KNOWN": known, "ACTIVATION": number, "SLOPE": slope, **_shape(walk, operands[1].dtype)
    }  # fmt: skip


def _can_follow(call: Call, x: Tensor) -> bool:
    """Whether a kernel can move the running statistics of `call`."""
    mean, var, batches = call.running_mean, call.running_var, call.batches
    return (
        type(mean) is Tensor
        and type(var) is Tensor
        and call.rate is not None
        and all(
            values.dtype in _KEPT and values.device == x.device and values.is_contiguous()
            for values in (mean, var)
        )
        and mean.dtype == var.dtype
        and (batches is None or _is_counter(batches, x))
        and (not isinstance(call.rate, Tensor) or call.rate.device == x.device)
    )


def _is_counter(number: Tensor | None, x: Tensor) -> bool:
    """Whether a kernel on `x` can count in `number`."""
    return type(number) is Tensor and number.dtype == torch.int64 and number.device == x.device


def _mark_changed(call: Call) -> None:
    """Tell autograd, which may have saved them, that the running statistics may have changed."""
    changed = [each for each in (call.running_mean, call.running_var, call.batches) if each is not None]
    if not changed[0].is_inference():
        torch.autograd.graph.increment_version(changed)


def _contiguous(values: Any) -> Any:
    return values if values is None else values.resolve_neg().contiguous()


@cache
def _kernels() -> ModuleType:
    # only where they are needed: Triton is not among what this library requires, and takes a second to import
    from batchnorm.kernels import triton_kernels

    return triton_kernels
