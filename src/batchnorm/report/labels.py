"""Text in figures: text at a point, and the labels of lines, at their ends or in a legend above."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

from batchnorm.report.curve import Curve, printable

SIZE = 12.5  # of text, in points
ROW = 18.0  # from one line of text to the next
_SAMPLE = 26.0  # length of a line sample in a legend
_SPACE = 18.0  # between two entries of a legend


@dataclass(frozen=True)
class Box:
    """A rectangle of a figure, in points from its bottom left."""

    left: float
    bottom: float
    width: float
    height: float


def points(figure: Figure) -> tuple[float, float]:
    """The figure's width and height."""
    width, height = figure.get_size_inches()
    return width * 72, height * 72


def write(
    figure: Figure, x: float, y: float, text: str, colour: str, size: float = SIZE, **font: Any
) -> None:
    """Write `text` at a point of `figure`, literally: `$` does not start a formula."""
    across, down = points(figure)
    figure.text(x / across, y / down, printable(text), color=colour, fontsize=size, parse_math=False, **font)


def width(text: str) -> float:
    """The width of `text` in points."""
    # an upper bound for the page: its font is narrower than the one measured here
    renderer = RendererAgg(1, 1, 72)  # type: ignore[no-untyped-call]
    size = renderer.get_text_width_height_descent(text, FontProperties(size=SIZE), False)  # type: ignore[no-untyped-call]
    return float(size[0])


def labels_fit_at_end(axes: Axes, named: list[Curve], box: Box) -> bool:
    """Whether the lines can be labelled in the right margin: labels are short, and lines end near it."""
    if not named or len(named) > 6 or max(width(curve.label) for curve in named) > 0.28 * box.width:
        return False
    # the x of a line's end as a share of the axis, linear or logarithmic
    share = axes.get_xaxis_transform() - axes.transAxes
    return all(share.transform((curve.end[0], 0.0))[0] > 0.9 for curve in named if curve.end)


def draw_end_labels(figure: Figure, axes: Axes, inner: Box, named: list[Curve]) -> None:
    """Write each label right of the axes, which cover `inner`, at the height of its line's end."""
    low, high = axes.get_ylim()
    heights = [(curve.end[1] - low) / (high - low) if curve.end else 0.0 for curve in named]
    wanted = [inner.bottom + inner.height * min(max(height, 0.0), 1.0) for height in heights]
    places = spread_out(wanted, 15.0, inner.bottom, inner.bottom + inner.height)
    for curve, y in zip(named, places, strict=True):
        write(figure, inner.left + inner.width + 6, y, curve.label, curve.name_colour, va="center_baseline")


def spread_out(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the `wanted` ones, in the same order and `gap` apart, between `low` and `high` if they fit."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places = [wanted[index] for index in order]
    for _ in range(100):
        for index in range(len(places) - 1):
            overlap = max(gap - (places[index + 1] - places[index]), 0.0)
            places[index] -= overlap / 2
            places[index + 1] += overlap / 2
        shift = max(low - places[0], 0.0) + min(high - places[-1], 0.0) if places else 0.0
        places = [place + shift for place in places]
    return [place for _, place in sorted(zip(order, places, strict=True))]


def legend_rows(named: list[Curve], across: float) -> list[list[Curve]]:
    """The rows of a legend, with as many entries each as fit."""
    rows: list[list[Curve]] = []
    used = math.inf
    for curve in named:
        needed = _SAMPLE + 6 + width(curve.label)
        if used + needed > across:
            rows.append([])
            used = 0.0
        rows[-1].append(curve)
        used += needed + _SPACE
    return rows


def legend(figure: Figure, left: float, y: float, row: list[Curve]) -> None:
    """Draw one row of a legend."""
    across, down = points(figure)
    for curve in row:
        sample = Line2D(
            [(left + share * _SAMPLE) / across for share in (0.0, 0.5, 1.0)],
            [(y + 4) / down] * 3,
            color=curve.colour,
            linestyle=curve.style,
            linewidth=1.8,
            marker=curve.marker,
            markersize=4.5,
            markeredgewidth=0,
            markevery=[1],
        )
        figure.add_artist(sample)
        write(figure, left + _SAMPLE + 6, y, curve.label, curve.name_colour)
        left += _SAMPLE + 6 + width(curve.label) + _SPACE
