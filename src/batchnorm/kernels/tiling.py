"""How a tensor is cut into tiles and parts for the kernels in Triton: by its shape alone, so that results repeat.

Enough parts to occupy every multiprocessor of a large GPU, few enough that merging them costs nothing beside a launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from batchnorm.kernels.reference import groups

_TILE = 2048  # values: 16 for each of the threads of four warps
_WARPS = 4
_TILE_OF_ROWS = 4096
_WARPS_OF_ROWS = 8
_COLUMNS_OF_ROWS = 64  # 128 bytes of bfloat16: a whole line of a cache
_PROGRAMS = 2112  # 16 for each of the 132 multiprocessors of an H100 or H200
_PROGRAMS_OF_ROWS = 1056
_MOST_PARTS = 512  # unless a part were of too many tiles
_MOST_TILES = 64  # of a part, whose first tile's mean they are all centred by
_LARGEST = 2**31


@dataclass(frozen=True)
class Tiling:
    """See triton_kernels for `lines`, `width`, `step`, and for what a tile is.

    shape, stride: of the tensors that are walked; all operands are brought to them.
    rows: whether a line has all channels.
    group_lines, groups: so many lines have moments of their own, and there are so many groups.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    rows: bool
    lines: int
    channels: int
    width: int
    step: int
    group_lines: int
    groups: int
    tile: tuple[int, int]
    parts: int
    tiles_per_part: int
    warps: int

    @property
    def programs(self) -> tuple[int, int]:
        blocks = -(-self.channels // self.tile[1]) if self.rows else self.channels
        return blocks * self.groups, self.parts

    @property
    def counts(self) -> tuple[int, int]:
        """How many values a channel has in a group, and in the last one."""
        each, of_line = self.group_lines, 1 if self.rows else self.width
        return each * of_line, (self.lines - (self.groups - 1) * each) * of_line

    @property
    def small_enough(self) -> bool:
        """Whether numbers of 32 bits count a channel's values, and reach from one end of a tile to the other."""
        pitch = self.width if self.rows else self.channels * self.width
        count = self.lines * (1 if self.rows else self.width)
        return count < _LARGEST // 2 and self.tile[0] * pitch < _LARGEST and self.programs[0] < _LARGEST

    def dense(self, x: Tensor) -> Tensor:
        """`x`, or a copy of it that lies in memory as this says."""
        if (x.stride() == self.stride or _alike(self.shape, x.stride(), self.stride)) and not x.is_neg():
            return x
        return self.empty(x).copy_(x)

    def empty(self, x: Tensor) -> Tensor:
        """Memory for a tensor of the dtype of `x`."""
        return torch.empty_strided(self.shape, self.stride, dtype=x.dtype, device=x.device)


@lru_cache(maxsize=4096)
def tiling(shape: torch.Size, stride: tuple[int, ...], group: int = 0) -> Tiling:
    """That of tensors which lie in memory as one of `shape` and `stride`, not all of them without gaps."""
    samples, channels, *rest = shape
    positions = math.prod(rest)
    result = torch.empty_like(torch.empty_strided(shape, stride, device="meta"))  # as torch lays it out
    rows = positions == 1 or (not result.is_contiguous() and result.movedim(1, -1).is_contiguous())
    if rows:
        lines, width, of_group = samples * positions, channels, group * positions
        columns = min(_power_of_2(channels), _COLUMNS_OF_ROWS)
        tile = max(1, min(_power_of_2(lines), _TILE_OF_ROWS // columns)), columns
        across, programs, blocks = 1, _PROGRAMS_OF_ROWS, -(-channels // columns)
        walked = torch.empty((samples, *rest, channels), device="meta").movedim(-1, 1)
    else:
        lines, width, of_group = samples, positions, group
        tile = _tile(min(lines, group or lines), width)
        across, programs, blocks = -(-width // tile[1]), _PROGRAMS, channels
        walked = torch.empty(shape, device="meta")
    number = groups(samples, group) if group else 1
    of_group = of_group if number > 1 else lines
    tiles = -(-(lines - (number - 1) * of_group) // tile[0]) * across  # of the last group, the largest
    parts = min(tiles, _MOST_PARTS, max(1, -(-programs // (blocks * number))))
    parts = max(parts, -(-tiles // _MOST_TILES))
    each = -(-tiles // parts)
    walked_stride = walked.stride()
    if _alike(tuple(shape), result.stride(), walked_stride):
        walked_stride = result.stride()
    return Tiling(
        tuple(shape), walked_stride, rows, lines, channels, width,
        math.gcd(width, 16), of_group, number, tile, -(-tiles // each), each,
        _WARPS_OF_ROWS if rows else _WARPS,
    )  # fmt: skip


def _alike(shape: tuple[int, ...], one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether strides say the same; those of dimensions of one value say nothing."""
    return all(
        size == 1 or step == other_step for size, step, other_step in zip(shape, one, other, strict=True)
    )


def _tile(lines: int, width: int) -> tuple[int, int]:
    """Lines and columns of a tile, powers of 2: the tiles columns of which few are beyond a line's end."""

    def used(columns: int) -> float:
        return width / (-(-width // columns) * columns)

    candidates = [columns for columns in (2048, 1024, 512, 256, 128, 64) if columns < 2 * width]
    if not candidates:
        columns = _power_of_2(width)
    else:
        best = max(map(used, candidates))
        columns = next(columns for columns in candidates if used(columns) >= 0.9 * best)
    return max(1, min(_power_of_2(lines), _TILE // columns)), columns


def _power_of_2(number: int) -> int:
    """The least that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()
