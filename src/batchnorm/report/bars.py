"""A bar for each layer in the order of the model, as inline SVG that takes its colours from the page.

Written by hand: a bar has a text that shows when it is pointed at, and thousands of layers cost nothing.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from matplotlib.ticker import MaxNLocator

from batchnorm.report.curve import printable
from batchnorm.report.figures import settings
from batchnorm.report.labels import ROW, SIZE, width
from batchnorm.report.scale import format_number

_DRAWN = 400  # bars; of more the highest
_NAMED = 3  # of the highest bars
_HIGHEST = 5.0  # standard deviations at the upper end of the axis: one value without bounds must not flatten the others
_LETTERS = 34  # of a name in the figure
_DASHES = "fill: none; stroke: var(--text); stroke-width: 1.4; stroke-dasharray: 4 2.5"


@dataclass(frozen=True)
class Bar:
    """The value of a layer.

    path: of the layer.
    value: 0 or more.
    level: with which it is to be compared, if there is one.
    marked: whether something was found there.
    """

    path: str
    value: float
    level: float | None = None
    marked: bool = False


@dataclass(frozen=True)
class Words:
    """What is written in a figure: of the values, of the bars in two colours, and of the level."""

    values: str
    plain: str
    marked: str
    level: str


def drawn(bars: Sequence[Bar]) -> list[Bar]:
    """Those that there is room for: of many the highest, in the order of the model."""
    known = [bar for bar in bars if not math.isnan(bar.value)]
    kept = sorted(range(len(known)), key=lambda at: (-known[at].value, at))[:_DRAWN]
    return [known[at] for at in sorted(kept)]


@dataclass(frozen=True)
class _Frame:
    """Where a bar stands: the axes in points from the top left, and the value at their upper end."""

    left: float
    right: float
    head: float
    foot: float
    top: float
    number: int

    @property
    def step(self) -> float:
        return (self.right - self.left) / max(self.number, 1)

    def x(self, at: float) -> float:
        return self.left + at * self.step

    def y(self, value: float) -> float:
        return self.foot - (self.foot - self.head) * min(value / self.top, 1.0)


def svg(bars: Sequence[Bar], size: tuple[float, float], words: Words, label: str) -> str:
    """An <svg> element.

    size: in points, as that of `figures.inline_svg`.
    label: the aria-label.
    """
    with settings():  # of the font whose widths are measured
        parts = _parts(bars, size, words)
    box = f"0 0 {size[0]:g} {size[1]:g}"
    opening = f'<svg class="plot" viewBox="{box}" role="img" aria-label="{html.escape(printable(label))}">'
    return "\n".join([opening, *parts, "</svg>"])


def _parts(bars: Sequence[Bar], size: tuple[float, float], words: Words) -> list[str]:
    across, down = size
    top = _top(bars)
    ticks = [
        tick for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top) if 0 <= tick <= top
    ]
    rows = _legend(bars, words, across)
    left = 8 + max(width(format_number(tick)) for tick in ticks)
    head = ROW * (1 + len(rows)) + 20
    frame = _Frame(left, across, head, down - 2 * ROW - 8, top, len(bars))
    parts = [_text(0, 12, words.values, "muted")]
    for number, row in enumerate(rows):
        parts += _legend_row(row, ROW * (number + 1) + 12)
    for tick in ticks:
        height = frame.y(tick)
        parts.append(_line(left, height, across, height, "rule"))
        parts.append(_text(left - 6, height + 4.4, format_number(tick), "muted", "end"))
    parts += _bars(bars, frame, words)
    parts.append(_line(left, frame.foot, across, frame.foot, "muted"))
    parts += _levels(bars, frame)
    parts += _names(bars, frame)
    parts += _groups(bars, frame)
    parts.append(_text((left + across) / 2, down - 3, "layers, in the order of the model", "muted", "middle"))
    return parts


def _bars(bars: Sequence[Bar], frame: _Frame, words: Words) -> list[str]:
    gap = min(frame.step * 0.2, 4.0)
    parts = []
    for number, bar in enumerate(bars):
        height = max(frame.foot - frame.y(bar.value), 0.75)
        told = f"{bar.path}: {_said(bar.value)}"
        told += f", {words.level} {_said(bar.level)}" if bar.level is not None else ""
        parts.append(
            f'<rect x="{frame.x(number) + gap / 2:.2f}" y="{frame.foot - height:.2f}" '
            f'width="{max(frame.step - gap, 0.5):.2f}" height="{height:.2f}" '
            f'style="fill: var(--{"plain" if bar.marked else "bn"})">'
            f"<title>{html.escape(printable(told))}</title></rect>"
        )
        if bar.value > frame.top:  # a notch says that it goes on
            notch = f"M{frame.x(number):.2f} {frame.head + 12:.2f}l{frame.step:.2f} -6"
            parts.append(
                f'<path class="cut" d="{notch}" style="fill: none; stroke: var(--paper); stroke-width: 3"/>'
            )
    return parts


def _top(bars: Sequence[Bar]) -> float:
    """The upper end of the axis: a little more than the highest finite value, if that is not out of all bounds."""
    values = [
        value
        for bar in bars
        for value in (bar.value, bar.level)
        if value is not None and math.isfinite(value)
    ]
    highest = max(values, default=0.0)
    return min(highest * 1.04, _HIGHEST) if highest > 0 else 1.0


def _said(value: float) -> str:
    return format_number(float(f"{value:.3g}")) if math.isfinite(value) else "∞"


def _levels(bars: Sequence[Bar], frame: _Frame) -> list[str]:
    """The level as a line of steps, with gaps where there is none."""
    path, before = "", False
    for number, bar in enumerate(bars):
        known = bar.level is not None and math.isfinite(bar.level)
        if bar.level is not None and known:
            corner = f"{frame.x(number):.2f} {frame.y(bar.level):.2f}"
            path += f"{'L' if before else 'M'}{corner}H{frame.x(number + 1):.2f}"
        before = known
    return [f'<path d="{path}" style="{_DASHES}"/>'] if path else []


def _names(bars: Sequence[Bar], frame: _Frame) -> list[str]:
    """The names of the highest bars, as far as they cover neither each other nor a higher bar."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for at in sorted(range(len(bars)), key=lambda each: (-bars[each].value, each))[:_NAMED]:
        bar = bars[at]
        name = f"{_shortened(printable(bar.path))} {_said(bar.value)}"
        wide = width(name)
        start = min(max(frame.x(at + 0.5) - wide / 2, frame.left), frame.right - wide)
        base = frame.y(bar.value) - 6
        first, last = ((place - frame.left) / frame.step for place in (start, start + wide))
        behind = max(each.value for each in bars[max(int(first), 0) : int(last) + 1])
        covers = any(
            start < end + 8 and begin < start + wide + 8 and abs(base - other) < ROW
            for begin, end, other in taken
        )
        if bar.value > 0 and behind <= bar.value and not covers:
            taken.append((start, start + wide, base))
            parts.append(_text(start, base, name, "text"))
    return parts


def _groups(bars: Sequence[Bar], frame: _Frame) -> list[str]:
    """Below the axis: where the parts of the model begin, and their names where there is room."""
    paths = [bar.path.split(".") for bar in bars]
    shared = 0  # names that all begin with: "backbone.body"
    while len(bars) > 1 and all(
        len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths
    ):
        shared += 1
    parts, at = [], 0
    for name, group in groupby(path[shared] for path in paths):
        start, end = frame.x(at), frame.x(at + (number := len(list(group))))
        parts.append(_line(start, frame.foot, start, frame.foot + 4, "muted"))
        name = printable(name)
        if width(_shortened(name)) < end - start - 4:
            parts.append(_text((start + end) / 2, frame.foot + 16, _shortened(name), "muted", "middle"))
        at += number
    return parts


def _shortened(name: str) -> str:
    return name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"


def _legend(bars: Sequence[Bar], words: Words, across: float) -> list[list[tuple[str, str]]]:
    """The rows of the legend: what it explains and by which words, as many to a row as fit."""
    entries = [
        ("bn", words.plain) if any(not bar.marked for bar in bars) else None,
        ("plain", words.marked) if any(bar.marked for bar in bars) else None,
        ("level", words.level) if any(bar.level is not None for bar in bars) else None,
    ]
    rows: list[list[tuple[str, str]]] = []
    used = math.inf
    for entry in filter(None, entries):
        needed = 18 + width(entry[1])
        if used + needed > across:
            rows.append([])
            used = 0.0
        rows[-1].append(entry)
        used += needed + 18
    return rows


def _legend_row(row: list[tuple[str, str]], y: float) -> list[str]:
    parts, x = [], 0.0
    for kind, words in row:
        if kind == "level":
            parts.append(f'<path d="M{x:.2f} {y - 4:.2f}h12" style="{_DASHES}"/>')
        else:
            place = f'x="{x:.2f}" y="{y - 9:.2f}" width="11" height="10"'
            parts.append(f'<rect {place} style="fill: var(--{kind})"/>')
        parts.append(_text(x + 18, y, words, "muted"))
        x += 36 + width(words)
    return parts


def _line(x: float, y: float, x_end: float, y_end: float, colour: str) -> str:
    style = f"fill: none; stroke: var(--{colour}); stroke-width: 0.8"
    return f'<path d="M{x:.2f} {y:.2f}L{x_end:.2f} {y_end:.2f}" style="{style}"/>'


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start") -> str:
    style = f"font-size: {SIZE}px; text-anchor: {anchor}; fill: var(--{colour})"
    return f'<text x="{x:.2f}" y="{y:.2f}" style="{style}">{html.escape(printable(text))}</text>'
