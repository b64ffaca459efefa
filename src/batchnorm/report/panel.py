"""One panel of a chart: axes without a box, horizontal rules, and the lines named where they end.

Laid out by hand in points, from the bottom left of the figure, so that a phone's 360 points are used well.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchnorm.records import Panel
from batchnorm.report import lettering
from batchnorm.report.curve import Curve, curves
from batchnorm.report.ink import Ink
from batchnorm.report.lettering import ROW, Box, write
from batchnorm.report.scale import scale


def draw(figure: Figure, box: Box, panel: Panel, ink: Ink) -> None:
    """Draw `panel`, but for its title, into `box` of `figure`."""
    lines = curves(panel, ink)
    named = [line for line in lines if line.label and line.end]
    drawn = any(line.end for line in lines)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    for line in lines:
        _plot(axes, line)
    scale(axes, panel, drawn=drawn, wide=box.width > 450)
    dress(axes, ink, rules="y")

    at_end = lettering.fit_at_end(axes, named, box)
    rows = [] if at_end else lettering.key_rows(named, box.width)
    inner = _inside(axes, panel, box, rows, named if at_end else [])
    across, down = lettering.points(figure)
    axes.set_position((inner.left / across, inner.bottom / down, inner.width / across, inner.height / down))

    middle = inner.left + inner.width / 2
    baseline = box.bottom + box.height - 12
    if panel.y_label:
        write(figure, box.left, baseline, panel.y_label, ink.muted)
        baseline -= ROW
    for row in rows:
        lettering.key(figure, box.left, baseline, row)
        baseline -= ROW
    write(figure, middle, box.bottom + 3, panel.x_label, ink.muted, ha="center")
    if at_end:
        lettering.name_ends(figure, axes, inner, named)
    if not drawn:
        write(figure, middle, inner.bottom + inner.height / 2, "nothing measured", ink.muted, ha="center")


def _inside(axes: Axes, panel: Panel, box: Box, rows: list[list[Curve]], at_end: list[Curve]) -> Box:
    """What the words around them leave to the axes."""
    left = 8 + max((lettering.width(tick.get_text()) for tick in axes.get_yticklabels()), default=0.0)
    right = 12 + max(lettering.width(line.label) for line in at_end) if at_end else 10.0
    top = 10 + ROW * (len(rows) + bool(panel.y_label))
    bottom = 24 + ROW * bool(panel.x_label)
    return Box(
        box.left + left, box.bottom + bottom, box.width - left - right, max(box.height - bottom - top, 80.0)
    )


def _plot(axes: Axes, line: Curve) -> None:
    if line.low is not None and line.high is not None:
        there = np.isfinite(line.low) & np.isfinite(line.high)
        axes.fill_between(
            line.x, line.low, line.high, where=there.tolist(), color=line.colour, alpha=0.16, linewidth=0
        )
    # a point between two gaps has no line to show it
    there = np.isfinite(line.y)
    alone = there & ~np.r_[False, there[:-1]] & ~np.r_[there[1:], False]
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


def dress(axes: Axes, ink: Ink, *, rules: Literal["x", "y"]) -> None:
    """Leave of the box its foot, and put rules where the values of one axis are read."""
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=ink.muted, linewidth=0.8)
    axes.grid(axis=rules, color=ink.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", labelsize=lettering.SIZE, labelcolor=ink.muted)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.tick_params(axis="x", length=4, pad=4, color=ink.muted, width=0.8)
    axes.tick_params(axis="x", which="minor", length=2, color=ink.muted, width=0.6)
