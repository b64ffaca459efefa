"""One panel of a chart: axes without a frame, horizontal grid lines, and labels at the ends of lines.

The layout is computed in points, from the bottom left of the figure, to use a phone's 360 points well.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchnorm.records import Panel
from batchnorm.report import labels
from batchnorm.report.curve import Curve, curves
from batchnorm.report.labels import ROW, Box, write
from batchnorm.report.palette import Palette
from batchnorm.report.scale import scale


def draw(figure: Figure, box: Box, panel: Panel, palette: Palette) -> None:
    """Draw `panel`, without its title, into `box` of `figure`."""
    lines = curves(panel, palette)
    named = [line for line in lines if line.label and line.end]
    drawn = any(line.end for line in lines)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    for line in lines:
        _plot(axes, line)
    scale(axes, panel, drawn=drawn, wide=box.width > 450)
    style_axes(axes, palette, rules="y")

    at_end = labels.labels_fit_at_end(axes, named, box)
    rows = [] if at_end else labels.legend_rows(named, box.width)
    inner = _inner_box(axes, panel, box, rows, named if at_end else [])
    across, down = labels.points(figure)
    axes.set_position((inner.left / across, inner.bottom / down, inner.width / across, inner.height / down))

    middle = inner.left + inner.width / 2
    baseline = box.bottom + box.height - 12
    if panel.y_label:
        write(figure, box.left, baseline, panel.y_label, palette.muted)
        baseline -= ROW
    for row in rows:
        labels.legend(figure, box.left, baseline, row)
        baseline -= ROW
    write(figure, middle, box.bottom + 3, panel.x_label, palette.muted, ha="center")
    if at_end:
        labels.draw_end_labels(figure, axes, inner, named)
    if not drawn:
        write(figure, middle, inner.bottom + inner.height / 2, "nothing measured", palette.muted, ha="center")


def _inner_box(axes: Axes, panel: Panel, box: Box, rows: list[list[Curve]], at_end: list[Curve]) -> Box:
    """The box of the axes, inside of all labels."""
    left = 8 + max((labels.width(tick.get_text()) for tick in axes.get_yticklabels()), default=0.0)
    right = 12 + max(labels.width(line.label) for line in at_end) if at_end else 10.0
    top = 10 + ROW * (len(rows) + bool(panel.y_label))
    bottom = 24 + ROW * bool(panel.x_label)
    return Box(
        box.left + left, box.bottom + bottom, box.width - left - right, max(box.height - bottom - top, 80.0)
    )


def _plot(axes: Axes, line: Curve) -> None:
    if line.low is not None and line.high is not None:
        finite = np.isfinite(line.low) & np.isfinite(line.high)
        axes.fill_between(
            line.x, line.low, line.high, where=finite.tolist(), color=line.colour, alpha=0.16, linewidth=0
        )
    # an isolated point between two gaps has no line, so it gets a marker
    finite = np.isfinite(line.y)
    alone = finite & ~np.r_[False, finite[:-1]] & ~np.r_[finite[1:], False]
    axes.plot(
        line.x,
        line.y,
        color=line.colour,
        linestyle=line.style,
        linewidth=1.8,
        marker=line.marker or "o",
        markevery=None if line.marker else np.flatnonzero(alone).tolist(),
        markersize=4.5,
        markeredgewidth=0,
    )


def style_axes(axes: Axes, palette: Palette, *, rules: Literal["x", "y"]) -> None:
    """Style `axes`: only the bottom spine, and grid lines for the values of one axis."""
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=palette.muted, linewidth=0.8)
    axes.grid(axis=rules, color=palette.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", labelsize=labels.SIZE, labelcolor=palette.muted)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.tick_params(axis="x", length=4, pad=4, color=palette.muted, width=0.8)
    axes.tick_params(axis="x", which="minor", length=2, color=palette.muted, width=0.6)
