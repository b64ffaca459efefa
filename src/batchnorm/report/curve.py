"""The curves of a panel, ready to draw: gaps as nan, a colour per role, dashes to distinguish lines of one role."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.records import Line, Panel
from batchnorm.report.palette import Palette

_DRAWN = 2_000  # points of a line; more are thinned to the extremes of as many stretches
INFINITE = 1e100  # larger values are treated as infinite, and drawn as gaps

# Styles of the lines of one role, in order; further lines have markers too.
_SOLID: list[Any] = ["-", (0, (7, 2, 1.5, 2)), (0, (7, 2, 1.5, 2, 1.5, 2))]
_DASHED: list[Any] = [(0, (4, 2.5)), (0, (1.5, 1.8)), (0, (9, 3))]


@dataclass(frozen=True)
class Curve:
    """The points and the style of a line."""

    label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]  # nan is a gap
    low: NDArray[np.float64] | None
    high: NDArray[np.float64] | None
    colour: str
    name_colour: str
    style: Any
    marker: str

    @property
    def end(self) -> tuple[float, float] | None:
        """The last point, or None."""
        finite = np.flatnonzero(np.isfinite(self.y))
        return (float(self.x[finite[-1]]), float(self.y[finite[-1]])) if finite.size else None


def curves(panel: Panel, palette: Palette) -> list[Curve]:
    """The lines of `panel` in order."""
    count_by_role: dict[tuple[str, bool], int] = {}
    found = []
    for line in panel.lines:
        # a line without a label belongs to the previous one and has the same style
        number = max(count_by_role.get((line.role, line.dashed), -1) + bool(line.label), 0)
        count_by_role[line.role, line.dashed] = number
        tones = palette.tones(line.role)
        styles = _DASHED if line.dashed else _SOLID
        x = np.asarray(line.x, dtype=np.float64)
        undrawable = ~(np.abs(x) <= INFINITE) | (x <= 0 if panel.x_log else False)
        found.append(
            Curve(
                label=printable(line.label),
                x=np.where(undrawable, np.nan, x),
                y=_values(line.y, undrawable),
                low=None if line.low is None else _values(line.low, undrawable),
                high=None if line.high is None else _values(line.high, undrawable),
                colour=tones[number % 2],
                name_colour=tones[0],
                style=styles[number % len(styles)],
                marker="o" if line.markers else "s" if number >= len(styles) else "",
            )
        )
    return found


def thinned(line: Line) -> Line:
    """A line of about `_DRAWN` points at most: of each stretch the first, lowest and highest ones, and the last.

    Of a band the lowest and highest ones too.
    """
    if len(line.x) <= _DRAWN:
        return line
    drawn = [
        np.asarray([math.nan if value is None else value for value in values], dtype=np.float64)
        for values in (line.y, line.low, line.high)
        if values is not None
    ]
    kept = {len(line.x) - 1}
    for stretch in np.array_split(np.arange(len(line.x)), _DRAWN // (1 + 2 * len(drawn))):
        kept.add(int(stretch[0]))
        for values in (each[stretch] for each in drawn):
            if not np.isnan(values).all():
                kept |= {int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])}
    places = sorted(kept)

    def at(values: list[Any]) -> list[Any]:
        return [values[place] for place in places]

    low, high = (None if band is None else at(band) for band in (line.low, line.high))
    return line.model_copy(update={"x": at(line.x), "y": at(line.y), "low": low, "high": high})


def heights(line: Line) -> list[float]:
    """All y values of the line and its band."""
    values = [*line.y, *(line.low or ()), *(line.high or ())]
    return [value for value in values if value is not None and abs(value) <= INFINITE]


def printable(text: str) -> str:
    """The text on one line, without control characters, which are invalid in SVG."""
    words = (word for word in text.split(" ") if word)
    return " ".join("".join(c if c.isprintable() or c == "\u00a0" else " " for c in word) for word in words)


def _values(values: list[float | None], undrawable: NDArray[np.bool_]) -> NDArray[np.float64]:
    array = np.asarray([math.nan if value is None else value for value in values], dtype=np.float64)
    return np.where(undrawable | ~(np.abs(array) <= INFINITE), np.nan, array)
