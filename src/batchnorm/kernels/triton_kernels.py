"""The kernels of batch normalization for a GPU, in Triton: `triton_launches` says in which order they run.

A program works on one channel of an (N, C, *S) tensor that is contiguous, and on COLUMNS channels side by side of one
whose channels lie next to each other (ROWS). Either way it walks tiles of LINES lines by COLUMNS columns, of a line's
`width` values; a line is the values of a channel in one sample, or the channels at one position. The lines of a group
have moments of their own. Of `width`, and of nothing else, a kernel is told that it is a multiple of STEP: that much is
then read at once.

Per-channel numbers are float64, sums over a few tiles float32, of values that were centred first: see `Moments.of`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

# as every optional part is imported: the core needs torch alone, and this module is imported where there is Triton
triton: Any = import_module("triton")
tl: Any = import_module("triton.language")

# So many tiles are summed in float32 before their sum goes to float64: the roundings of equal terms all have one sign.
CHUNK: tl.constexpr = tl.constexpr(4)
NONE: tl.constexpr = tl.constexpr(0)  # the numbers of activations are those of native.FUSED
RELU: tl.constexpr = tl.constexpr(1)
LEAKY_RELU: tl.constexpr = tl.constexpr(2)

# What sums are formed in, by the dtype of the input; see moments.accumulator.
WIDE = {dtype: tl.float32 for dtype in (torch.float32, torch.bfloat16, torch.float16)} | {
    torch.float64: tl.float64
}
INTERPRETED: bool = triton.knobs.runtime.interpret  # rather than compiled: decided when they are decorated

# A size of 1 or a multiple of 16 is no reason to compile a kernel once more.
SIZES = ["lines", "channels", "steps", "group_lines", "groups", "tiles_per_part", "parts", "numbers"]


@triton.jit
def _group(lines, channels, steps, group_lines, groups, STEP: tl.constexpr, ROWS: tl.constexpr,
           COLUMNS: tl.constexpr):  # fmt: skip
    """What a program works on: its channels and its group.

    The first channel, all of them, which of them there are, their places among those of all groups; the group's lines
    from `begin` to `end`, and how many values a channel has in these.
    """
    blocks = tl.cdiv(channels, COLUMNS) if ROWS else channels
    group = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks
    if ROWS:
        first = first * COLUMNS
        channel = first + tl.arange(0, COLUMNS)
        across = 1
    else:
        channel = first + tl.arange(0, 1)
        across = steps * STEP
    begin = group * group_lines
    end = tl.where(group == groups - 1, lines, begin + group_lines)  # what is left over joins the last group
    count = ((end - begin) * across).to(tl.float64)
    return first, channel, channel < channels, group * channels + channel, begin, end, count


@triton.jit
def _tile(tile, first, begin, end, channels, steps, STEP: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr,
          COLUMNS: tl.constexpr):  # fmt: skip
    """Where a tile starts, the places of its values from there, which of them there are, and how many of a channel."""
    width = steps * STEP
    if ROWS:
        line, column, pitch = begin + tile * LINES, first, width
        start = line.to(tl.int64) * width + column
        number = tl.minimum(end - line, LINES)
    else:
        across = tl.cdiv(width, COLUMNS)
        line, column, pitch = begin + tile // across * LINES, tile % across * COLUMNS, channels * width
        start = (line.to(tl.int64) * channels + first) * width + column
        number = tl.minimum(end - line, LINES) * tl.minimum(width - column, COLUMNS)
    down, right = tl.arange(0, LINES), tl.arange(0, COLUMNS)
    there = (line + down < end)[:, None] & (column + right < width)[None, :]
    # within a tile 32 bits are enough, wherever it starts
    return start, down[:, None] * pitch + right[None, :], there, number


@triton.jit
def _tiles(begin, end, steps, tiles_per_part, STEP: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr,
           COLUMNS: tl.constexpr):  # fmt: skip
    """The tiles of this program's part of a group: the first, and the one after the last."""
    tiles = tl.cdiv(end - begin, LINES)
    if not ROWS:
        tiles = tiles * tl.cdiv(steps * STEP, COLUMNS)
    first = tl.program_id(1) * tiles_per_part
    return first, tl.minimum(first + tiles_per_part, tiles)


@triton.jit
def _total(values, ROWS: tl.constexpr):
    """The sums over a tile of each channel of it."""
    total = tl.sum(values, 0)
    return total if ROWS else tl.sum(total, 0, keep_dims=True)


@triton.jit
def _double(values):
    """As float64; Triton's interpreter knows the way from and to a half type by float32 alone."""
    if values.dtype == tl.float64:
        return values
    else:
        return values.to(tl.float32).to(tl.float64)


@triton.jit
def _rounded(values, dtype: tl.constexpr):
    """`values` of float64 as those of another dtype."""
    if dtype == tl.float64:
        return values
    else:
        return values.to(tl.float32).to(dtype)


@triton.jit
def _per_channel(values, channel, there, default: tl.constexpr):
    """float64 of each channel; `default` where there are no values."""
    if values is None:
        return tl.full(channel.shape, default, tl.float64)
    else:  # without it this would be compiled as well
        return _double(tl.load(values + channel, mask=there, other=default))


@triton.jit
def _is_finite(values):
    return tl.abs(values) < float("inf")  # false of a nan


@triton.jit
def _scale(mean, spread, place, there, count, eps, KNOWN: tl.constexpr):
    """Mean and 1/√(variance + eps), float64; `spread` is the variance if it was KNOWN, else m2."""
    centre = _double(tl.load(mean + place, mask=there, other=0))
    variance = _double(tl.load(spread + place, mask=there, other=1))
    if not KNOWN:
        variance = variance / count
    return centre, 1 / tl.sqrt(variance + eps)


@triton.jit
def _line(centre, scale, weight, bias, channel, there, WIDE: tl.constexpr):
    """(high, low, factor, shift) such that weight·(x - mean)·scale + bias is factor·(x - high) + shift.

    x - high cancels nothing that x has: `high` is the mean rounded, and what it lacks, `low`, is in the shift.
    """
    factor = scale * _per_channel(weight, channel, there, 1.0)
    high = centre.to(WIDE)
    low = centre - high.to(tl.float64)
    shift = tl.fma(-low, factor, _per_channel(bias, channel, there, 0.0))
    return high, low, factor.to(WIDE), shift.to(WIDE)


@triton.jit
def _on_line(deviation, factor, shift, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """In one rounding, so that every kernel finds the same bits."""
    return tl.fma(
        deviation, factor[None, :].broadcast_to(LINES, COLUMNS), shift[None, :].broadcast_to(LINES, COLUMNS)
    )


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """A nan fails every comparison and comes through, as torch's do."""
    if ACTIVATION == NONE:
        return z
    elif ACTIVATION == RELU:
        return tl.where(z <= 0, 0, z)
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(z <= 0, z * SLOPE, z)
    else:
        return tl.where(z <= 0, 0, tl.where(z >= 6, 6, z))


@triton.jit
def _through(dy, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Dy times the activation's derivative; z is what it was given, or what it returned, which tells as much."""
    if ACTIVATION == NONE:
        return dy
    elif ACTIVATION == RELU:
        return tl.where(z <= 0, 0, dy)
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(z > 0, dy, dy * SLOPE)
    else:
        return tl.where((z <= 0) | (z >= 6), 0, dy)


@triton.jit(do_not_specialize=SIZES)
def moments_of_parts(
    x, found, entered, lines, channels, steps, group_lines, groups, tiles_per_part,
    STEP: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Count, mean and m2 of each part: `found` is (parts, 3, groups·C). `entered` becomes true."""
    first, channel, is_one, place, begin, end, _ = _group(
        lines, channels, steps, group_lines, groups, STEP, ROWS, COLUMNS
    )
    if entered is not None:  # noqa: SIM102, what is None is known when this is compiled
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(entered, 1)
    tile, last = _tiles(begin, end, steps, tiles_per_part, STEP, ROWS, LINES, COLUMNS)
    # Any constant near the part's mean will do: that of its first tile, about the first value, which is exact where all
    # are equal.
    start, places, there, number = _tile(tile, first, begin, end, channels, steps, STEP, ROWS, LINES, COLUMNS)
    one = tl.load(x + start + (channel - first), mask=is_one & (tile < last), other=0).to(WIDE)
    values = tl.load(x + start + places, mask=there, other=0).to(WIDE)
    centred = tl.where(there, values - one[None, :], 0)
    shift = one + _total(centred, ROWS) / tl.maximum(number, 1).to(WIDE)
    count = (tile * 0).to(tl.float64)
    mean = tl.zeros(channel.shape, tl.float64)
    m2 = tl.zeros(channel.shape, tl.float64)
    while tile < last:
        sums = tl.zeros((LINES, COLUMNS), WIDE)
        squares = tl.zeros((LINES, COLUMNS), WIDE)
        added = tile * 0
        for each in range(tile, tl.minimum(tile + CHUNK, last)):
            start, places, there, number = _tile(
                each, first, begin, end, channels, steps, STEP, ROWS, LINES, COLUMNS
            )
            values = tl.load(x + start + places, mask=there, other=0).to(WIDE)
            centred = tl.where(there, values - shift[None, :], 0)
            sums += centred
            squares += centred * centred
            added += number
        weight = added.to(tl.float64)
        total = _total(sums, ROWS).to(tl.float64)
        moved = total / weight
        own = _total(squares, ROWS).to(tl.float64) - total * moved
        # as Moments.merge
        distance = shift.to(tl.float64) + moved - mean
        share = weight / (count + weight)
        mean += distance * share
        m2 += tl.where(own < 0, 0, own) + distance * distance * (count * share)
        count += weight
        shift = mean.to(WIDE)  # nearer to what comes next, where values drift
        tile += CHUNK
    row = groups * channels
    out = found + tl.program_id(1).to(tl.int64) * 3 * row + place
    tl.store(out, tl.zeros(channel.shape, tl.float64) + count, mask=is_one)
    tl.store(out + row, mean, mask=is_one)
    tl.store(out + 2 * row, m2, mask=is_one)


@triton.jit(do_not_specialize=SIZES)
def merge_moments(
    found, stats, running_mean, entered, parts, numbers, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Mean and m2 of all parts together, to `stats`, (2, numbers) (Chan, Golub & LeVeque 1979).

    `entered` becomes false where one of them is not finite in the dtype of the running statistics.
    """
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_one = place < numbers
    origin = tl.load(found + numbers + place, mask=is_one, other=0)  # part 0 always has values
    count = tl.zeros((COLUMNS,), tl.float64)
    moved = tl.zeros((COLUMNS,), tl.float64)
    squared = tl.zeros((COLUMNS,), tl.float64)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & is_one[None, :]
        row = part.to(tl.int64)[:, None] * 3 * numbers + place[None, :]
        weight = tl.load(found + row, mask=there, other=0)
        mean = tl.load(found + row + numbers, mask=there, other=0)
        m2 = tl.load(found + row + 2 * numbers, mask=there, other=0)
        distance = tl.where(weight > 0, mean - origin[None, :], 0)
        count += tl.sum(weight, 0)
        moved += tl.sum(weight * distance, 0)
        squared += tl.sum(tl.where(weight > 0, m2 + weight * distance * distance, 0), 0)
    total = tl.maximum(count, 1)  # columns beyond the channels have no values
    mean = origin + moved / total
    m2 = squared - moved * moved / total
    m2 = tl.where(m2 < 0, 0, m2)
    tl.store(stats + place, mean, mask=is_one)
    tl.store(stats + numbers + place, m2, mask=is_one)
    if entered is not None:
        kept = running_mean.dtype.element_ty
        # one value has no unbiased variance: 0/0 is not finite either
        stored = mean.to(kept) + (m2 / (count - 1)).to(kept)
        broken = tl.sum((is_one & (_is_finite(stored) == 0)).to(tl.int32), 0) > 0
        if broken:
            tl.store(entered, 0)


@triton.jit
def _follow(running, place, there, batch, rate):
    """The running statistics move towards the batch's; at a rate of 1 they are its exactly."""
    before = tl.load(running + place, mask=there, other=0).to(tl.float64)
    batch = batch.to(running.dtype.element_ty).to(tl.float64)
    after = tl.where(rate < 0.5, before + rate * (batch - before), batch - (batch - before) * (1 - rate))
    tl.store(running + place, _rounded(after, running.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=SIZES)
def normalise(
    x, residual, y, weight, bias, mean, spread, running_mean, running_var, batches, skipped, entered, rate,
    rate_value: tl.float64, eps: tl.float64, lines, channels, steps, group_lines, groups, tiles_per_part,
    KNOWN: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = activation(weight·(x - mean)/√(variance + eps) + bias + residual); see `_scale` for `spread` and KNOWN.

    The running statistics follow, unless `entered` is None or false, by `rate`, or by `rate_value` where it is None;
    `batches` counts that they do, and `skipped` that they do not.
    """
    first, channel, is_one, place, begin, end, count = _group(
        lines, channels, steps, group_lines, groups, STEP, ROWS, COLUMNS
    )
    centre, scale = _scale(mean, spread, place, is_one, count, eps, KNOWN)
    if entered is not None:  # noqa: SIM102
        if tl.program_id(1) == 0:
            enters = tl.load(entered) != 0
            if rate is not None:
                share = tl.full(channel.shape, 0, tl.float64) + tl.load(rate).to(tl.float64)
            else:
                share = tl.full(channel.shape, 0, tl.float64) + rate_value
            m2 = tl.load(spread + place, mask=is_one, other=0)
            _follow(running_mean, channel, is_one & enters, centre, share)
            _follow(running_var, channel, is_one & enters, m2 / (count - 1), share)
            if batches is not None:  # noqa: SIM102
                if tl.program_id(0) == 0:
                    tl.store(batches, tl.load(batches) + enters.to(tl.int64))
            if skipped is not None:  # noqa: SIM102
                if tl.program_id(0) == 0:
                    tl.store(skipped, tl.load(skipped) + 1 - enters.to(tl.int64))
    high, _low, factor, shift = _line(centre, scale, weight, bias, channel, is_one, WIDE)
    tile, last = _tiles(begin, end, steps, tiles_per_part, STEP, ROWS, LINES, COLUMNS)
    for each in range(tile, last):
        start, places, there, _number = _tile(
            each, first, begin, end, channels, steps, STEP, ROWS, LINES, COLUMNS
        )
        values = tl.load(x + start + places, mask=there, other=0).to(WIDE)
        z = _on_line(values - high[None, :], factor, shift, LINES, COLUMNS)
        if residual is not None:
            z += tl.load(residual + start + places, mask=there, other=0).to(WIDE)
        z = _activate(z, ACTIVATION, SLOPE)
        tl.store(y + start + places, z.to(y.dtype.element_ty), mask=there)


@triton.jit
def _gradient_at(
    dy, x, y, start, places, there, high, factor, shift, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient that came through the activation, 0 beyond the tensor, and x - high, of a tile."""
    values = tl.load(x + start + places, mask=there, other=0).to(WIDE)
    g = tl.load(dy + start + places, mask=there, other=0).to(WIDE)
    deviation = values - high[None, :]
    if ACTIVATION != NONE:
        if y is not None:  # what a residual was added to cannot be computed again from x
            z = tl.load(y + start + places, mask=there, other=0).to(WIDE)
        else:
            z = _on_line(deviation, factor, shift, LINES, COLUMNS)
        g = _through(g, z, ACTIVATION, SLOPE)
    return g, deviation


@triton.jit(do_not_specialize=SIZES)
def sums_of_parts(
    dy, x, y, dx, dresidual, weight, bias, mean, spread, found, eps: tl.float64, lines, channels, steps, group_lines,
    groups, tiles_per_part,
    KNOWN: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Σ g and Σ g·(x - high) of each part, to `found`, (parts, 2, groups·C); g is dy through the activation.

    `dx` is not None where the moments are constants: then scale·g is all of it, and written on the way.
    """
    first, channel, is_one, place, begin, end, count = _group(
        lines, channels, steps, group_lines, groups, STEP, ROWS, COLUMNS
    )
    centre, scale = _scale(mean, spread, place, is_one, count, eps, KNOWN)
    high, _low, factor, shift = _line(centre, scale, weight, bias, channel, is_one, WIDE)
    total = tl.zeros(channel.shape, WIDE)
    product = tl.zeros(channel.shape, WIDE)
    tile, last = _tiles(begin, end, steps, tiles_per_part, STEP, ROWS, LINES, COLUMNS)
    while tile < last:
        sums = tl.zeros((LINES, COLUMNS), WIDE)
        products = tl.zeros((LINES, COLUMNS), WIDE)
        for each in range(tile, tl.minimum(tile + CHUNK, last)):
            start, places, there, _number = _tile(
                each, first, begin, end, channels, steps, STEP, ROWS, LINES, COLUMNS
            )
            g, deviation = _gradient_at(
                dy, x, y, start, places, there, high, factor, shift, ACTIVATION, SLOPE, LINES, COLUMNS, WIDE
            )  # fmt: skip
            sums += g
            products += g * deviation
            if dx is not None:
                tl.store(dx + start + places, (g * factor[None, :]).to(dx.dtype.element_ty), mask=there)
                if dresidual is not None:
                    tl.store(dresidual + start + places, g.to(dresidual.dtype.element_ty), mask=there)
        total += _total(sums, ROWS)
        product += _total(products, ROWS)
        tile += CHUNK
    row = groups * channels
    out = found + tl.program_id(1).to(tl.int64) * 2 * row + place
    tl.store(out, total.to(tl.float64), mask=is_one)
    tl.store(out + row, product.to(tl.float64), mask=is_one)


@triton.jit(do_not_specialize=[*SIZES, "count", "last_count"])
def merge_sums(
    found, sums, dweight, dbias, mean, spread, eps: tl.float64, channels, count, last_count, parts, numbers,
    KNOWN: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Σ g and Σ g·x̂ of all parts, to `sums`, (2, numbers), and rounded to `dbias` and `dweight`, unless None.

    A channel has `count` values, and in the last group `last_count`.
    """
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_one = place < numbers
    total = tl.zeros((COLUMNS,), tl.float64)
    product = tl.zeros((COLUMNS,), tl.float64)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & is_one[None, :]
        row = part.to(tl.int64)[:, None] * 2 * numbers + place[None, :]
        total += tl.sum(tl.load(found + row, mask=there, other=0), 0)
        product += tl.sum(tl.load(found + row + numbers, mask=there, other=0), 0)
    values = tl.where(place < numbers - channels, count, last_count).to(tl.float64)
    centre, scale = _scale(mean, spread, place, is_one, values, eps, KNOWN)
    low = centre - centre.to(WIDE).to(tl.float64)  # as in `_line`
    product = (product - low * total) * scale
    tl.store(sums + place, total, mask=is_one)
    tl.store(sums + numbers + place, product, mask=is_one)
    if dweight is not None:
        tl.store(dbias + place, _rounded(total, dbias.dtype.element_ty), mask=is_one)
        tl.store(dweight + place, _rounded(product, dweight.dtype.element_ty), mask=is_one)


@triton.jit(do_not_specialize=SIZES)
def gradients(
    dy, x, y, dx, dresidual, weight, bias, mean, spread, averages, eps: tl.float64, lines, channels, steps, group_lines,
    groups, tiles_per_part,
    SUMS: tl.constexpr, KNOWN: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx = scale·(g - average(g) - x̂·average(g·x̂)), and dresidual = g unless None.

    `averages`, (2, groups·C), are SUMS over the values at hand if so called, to be divided by their count.
    """
    first, channel, is_one, place, begin, end, count = _group(
        lines, channels, steps, group_lines, groups, STEP, ROWS, COLUMNS
    )
    centre, scale = _scale(mean, spread, place, is_one, count, eps, KNOWN)
    high, low, factor, shift = _line(centre, scale, weight, bias, channel, is_one, WIDE)
    average = tl.load(averages + place, mask=is_one, other=0)
    product = tl.load(averages + groups * channels + place, mask=is_one, other=0) * scale
    if SUMS:
        average = average / count
        product = product / count
    average = (average - low * product).to(WIDE)
    product = product.to(WIDE)
    tile, last = _tiles(begin, end, steps, tiles_per_part, STEP, ROWS, LINES, COLUMNS)
    for each in range(tile, last):
        start, places, there, _number = _tile(
            each, first, begin, end, channels, steps, STEP, ROWS, LINES, COLUMNS
        )
        g, deviation = _gradient_at(
            dy, x, y, start, places, there, high, factor, shift, ACTIVATION, SLOPE, LINES, COLUMNS, WIDE
        )  # fmt: skip
        centred = (g - average[None, :]) - deviation * product[None, :]
        tl.store(dx + start + places, (centred * factor[None, :]).to(dx.dtype.element_ty), mask=there)
        if dresidual is not None:
            tl.store(dresidual + start + places, g.to(dresidual.dtype.element_ty), mask=there)
