"""How tensors lie in memory, as the native kernels walk them: (outer, channels, inner); see native/kernels.h."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Strided = tuple[int, int, int]  # address, outer stride, channel stride
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_of(x: Tensor) -> Layout:
    """The layout by which `x` and tensors of its shape are walked; made once for each shape and stride."""
    return _layout(x.shape, x.stride())


class Layout:
    """The sizes by which a call walks its tensors, which all have one shape and mostly one stride."""

    __slots__ = ("_by_rows", "_shape", "_steps", "_stride", "sizes")

    def __init__(self, x: Tensor) -> None:
        self._shape = x.shape
        samples, channels = x.size(0), x.size(1)
        positions = x.numel() // (samples * channels)
        rows = (samples * positions, channels, 1)
        self._stride: tuple[int, ...] | None = x.stride()  # of the tensors that are walked by these steps
        if x.is_contiguous():
            self.sizes, self._by_rows = (samples, channels, positions), positions == 1
            self._steps = channels * positions, positions
        elif x.dim() in _CHANNELS_LAST and x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()]):
            self.sizes, self._by_rows, self._steps = rows, True, (channels, 1)
        else:
            side_by_side = channels == 1 or x.stride(1) == 1
            self._by_rows = positions == 1 or (side_by_side and _rows(x) is not None)
            self.sizes = rows if self._by_rows else (samples, channels, positions)
            steps = self._steps_of(x)
            self._stride, self._steps = (None, (0, 0)) if steps is None else (x.stride(), steps)

    def rows(self, samples: int) -> int:
        """How many `outer` rows so many samples are."""
        return samples * (self.sizes[0] // self._shape[0])

    def operand(self, x: Tensor) -> tuple[Tensor, Strided]:
        """`x` or a copy of it that can be walked, which the caller keeps alive."""
        if x.stride() == self._stride and not x.is_neg():
            return x, (x.data_ptr(), *self._steps)
        found = None if x.is_neg() else self._strided(x)
        if found is None:
            x = self._empty(x).copy_(x)
            found = self._strided(x)
            assert found is not None
        return x, found

    def result(self, y: Tensor) -> tuple[Tensor, Strided]:
        """`y`, or memory for it that can be walked."""
        if y.stride() == self._stride:
            return y, (y.data_ptr(), *self._steps)
        found = self._strided(y)
        if found is None:
            y = self._empty(y)
            found = self._strided(y)
            assert found is not None
        return y, found

    def _strided(self, x: Tensor) -> Strided | None:
        steps = self._steps_of(x)
        return None if steps is None else (x.data_ptr(), *steps)

    def _steps_of(self, x: Tensor) -> tuple[int, int] | None:
        """The strides from one `outer` and from one channel to the next, or None where `x` cannot be walked."""
        outer, channels, inner = self.sizes
        if x.is_contiguous() and outer == x.size(0):
            return channels * inner, inner
        if not self._by_rows:
            return (x.stride(0), x.stride(1)) if _runs(x, range(2, x.dim())) == 1 else None
        if channels > 1 and x.stride(1) != 1:
            return None
        stride = x.stride(0) if outer == x.size(0) else _rows(x)
        return None if stride is None else (stride, 1)

    def _empty(self, x: Tensor) -> Tensor:
        samples, channels, *positions = self._shape
        if not self._by_rows:
            return torch.empty(self._shape, dtype=x.dtype, device=x.device)
        return torch.empty((samples, *positions, channels), dtype=x.dtype, device=x.device).movedim(-1, 1)


# a training loop meets the same shapes in every step, and a layout costs as much as five calls of torch
@lru_cache(maxsize=4096)
def _layout(shape: torch.Size, stride: tuple[int, ...]) -> Layout:
    return Layout(torch.empty_strided(shape, stride, device="meta"))


def _rows(x: Tensor) -> int | None:
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
