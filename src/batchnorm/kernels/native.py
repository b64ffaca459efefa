"""The native kernels on tensors: views (outer, channels, inner) of them, and the results' memory.

`forward` and `backward` compute what `reference` does, for tensors on a CPU; see native/kernels.h.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import batchnorm.kernels._native as _native
from batchnorm.kernels.reference import Given

NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
Fused = tuple[int, float]  # an activation's number in the kernels, and its slope
NONE: Fused = (0, 0.0)
LEAKY_RELU = 2
FUSED: dict[str, Fused] = {"relu": (1, 0.0), "leaky_relu": (LEAKY_RELU, 0.01), "relu6": (3, 0.0)}

Strided = tuple[int, int, int]  # address, outer stride, channel stride
_ABSENT: Strided = (0, 0, 0)
_DEFAULT = (0, 0)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Fused,
    given: Given | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = activation(bn(x) + residual), and the moments' mean and m2, (C,) float64.

    By the mean and the variance `given`, (C,) each, which then are what is returned, or else by the batch's own.
    """
    sizes, rows = _sizes(x)
    y = torch.empty_like(x)
    x, of_x = _operand(x, rows, sizes)
    out, of_y = _result(y, x, rows, sizes)
    if given is None:
        mean = torch.empty(sizes[1], dtype=torch.float64, device=x.device)
        m2 = torch.empty(sizes[1], dtype=torch.float64, device=x.device)
        count = float(sizes[0] * sizes[2])
    else:
        mean, m2 = (values.resolve_neg().contiguous() for values in given)
        count = 1.0
    of_residual, weight, bias = _ABSENT, _dense(weight), _dense(bias)
    if residual is not None:
        residual, of_residual = _operand(residual, rows, sizes)
    _native.forward(
        sizes, NUMBERS[x.dtype], of_x, of_residual, of_y, _values(weight), _values(bias), eps, *activation,
        _values(mean), _values(m2), count, given is not None, torch.get_num_threads(),
    )  # fmt: skip
    return (y if out is y else y.copy_(out)), mean, m2


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `forward`: (dx, dweight, dbias, dresidual).

    `mean` and `m2` are what `forward` returned. `y` is its result where a residual was added before an activation, and
    only then is dresidual a tensor. dweight and dbias are (C,), of the dtype of weight and bias or else float64.
    """
    sizes, rows = _sizes(x)
    dx = torch.empty_like(x)
    dresidual = None if y is None else torch.empty_like(x)
    x, of_x = _operand(x, rows, sizes)
    dy, of_dy = _operand(dy if dy.dtype == x.dtype else dy.to(x.dtype), rows, sizes)
    out, of_dx = _result(dx, x, rows, sizes)
    residual_out, of_y, of_dresidual = None, _ABSENT, _ABSENT
    if y is not None and dresidual is not None:
        y, of_y = _operand(y, rows, sizes)
        residual_out, of_dresidual = _result(dresidual, x, rows, sizes)
    weight, bias = _dense(weight), _dense(bias)
    dweight, dbias = gradient_of(weight, x), gradient_of(bias, x)
    _native.backward(
        sizes, NUMBERS[x.dtype], of_dy, of_x, of_y, _values(weight), _values(bias), eps, *activation,
        _values(mean), _values(m2), 1.0 if given else float(sizes[0] * sizes[2]), given,
        of_dx, of_dresidual, _values(dweight), _values(dbias), torch.get_num_threads(),
    )  # fmt: skip
    for result, computed in ((dx, out), (dresidual, residual_out)):
        if result is not None and computed is not None and computed is not result:
            result.copy_(computed)
    return dx, dweight, dbias, dresidual


def trackable(running_mean: Tensor, running_var: Tensor, batches: Tensor | None) -> bool:
    """Whether `track` can move these."""
    return (
        running_mean.device.type == running_var.device.type == "cpu"
        and running_mean.dtype == running_var.dtype
        and running_mean.dtype in (torch.float32, torch.float64)
        and running_mean.is_contiguous()
        and running_var.is_contiguous()
        and (batches is None or (batches.dtype == torch.int64 and batches.device.type == "cpu"))
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
        mean.numel(), float(count), mean.data_ptr(), m2.data_ptr(), _values(running_mean), _values(running_var),
        rate, 0 if batches is None else batches.data_ptr(),
    )  # fmt: skip
    if entered and not running_mean.is_inference():
        # autograd must know: it may have saved them
        moved = (running_mean, running_var) if batches is None else (running_mean, running_var, batches)
        torch.autograd.graph.increment_version(moved)
    return entered


def gradient_of(values: Tensor | None, x: Tensor) -> Tensor:
    """Memory for the gradient of a weight or bias of x's layer, float64 where there is none."""
    return x.new_empty(x.size(1), dtype=torch.float64) if values is None else torch.empty_like(values)


def observed(*tensors: Tensor | None) -> bool:
    """Whether somebody must see a call itself: a compiler, a dispatch mode, a tensor that is more than its memory."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(x) is not Tensor and type(x) is not nn.Parameter for x in tensors if x is not None)
    )


def _sizes(x: Tensor) -> tuple[tuple[int, int, int], bool]:
    """(outer, channels, inner), and whether the channels are what lies side by side in `x`."""
    samples, channels = x.size(0), x.size(1)
    positions = x.numel() // (samples * channels)
    if positions == 1:
        return (samples, channels, 1), True
    if not x.is_contiguous() and (channels == 1 or x.stride(1) == 1) and _by_rows(x) is not None:
        return (samples * positions, channels, 1), True
    return (samples, channels, positions), False


def _strided(x: Tensor, rows: bool, sizes: tuple[int, int, int]) -> Strided | None:
    """How to walk `x` as `sizes`, or None where its strides do not allow it."""
    if x.is_contiguous() and sizes[0] == x.size(0):
        return x.data_ptr(), sizes[1] * sizes[2], sizes[2]
    if not rows:
        return (x.data_ptr(), x.stride(0), x.stride(1)) if _runs(x, range(2, x.dim())) == 1 else None
    if sizes[0] == x.size(0):  # one position
        return (x.data_ptr(), x.stride(0), 1) if sizes[1] == 1 or x.stride(1) == 1 else None
    stride = _by_rows(x) if sizes[1] == 1 or x.stride(1) == 1 else None
    return None if stride is None else (x.data_ptr(), stride, 1)


def _by_rows(x: Tensor) -> int | None:
    """The stride from one position to the next, over all samples, if it is always the same."""
    return _runs(x, (0, *range(2, x.dim())))


def _runs(x: Tensor, dims: range | tuple[int, ...]) -> int | None:
    """The stride at which the elements of `dims`, the last fastest, follow each other, if it is always the same."""
    stride = expected = None
    for dim in reversed(dims):
        size = x.size(dim)
        if size == 1:
            continue
        if stride is None:
            stride = x.stride(dim)
        elif x.stride(dim) != expected:
            return None
        expected = x.stride(dim) * size
    return 1 if stride is None else stride


def _operand(x: Tensor, rows: bool, sizes: tuple[int, int, int]) -> tuple[Tensor, Strided]:
    """`x` or a copy of it that can be walked as `sizes`, which the caller keeps alive."""
    found = None if x.is_neg() else _strided(x, rows, sizes)
    if found is None:
        x = _empty(x, rows).copy_(x)
        found = _strided(x, rows, sizes)
        assert found is not None
    return x, found


def _result(y: Tensor, x: Tensor, rows: bool, sizes: tuple[int, int, int]) -> tuple[Tensor, Strided]:
    """`y`, or memory for it that can be walked as `sizes`."""
    found = _strided(y, rows, sizes)
    if found is None:
        y = _empty(x, rows)
        found = _strided(y, rows, sizes)
        assert found is not None
    return y, found


def _empty(x: Tensor, rows: bool) -> Tensor:
    if not rows:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty((x.size(0), *x.shape[2:], x.size(1)), dtype=x.dtype, device=x.device).movedim(-1, 1)


def _dense(values: Tensor | None) -> Tensor | None:
    if values is None or (values.is_contiguous() and not values.is_neg()):
        return values
    return values.resolve_neg().contiguous()


def _values(values: Tensor | None) -> tuple[int, int]:
    return _DEFAULT if values is None else (values.data_ptr(), NUMBERS[values.dtype])
