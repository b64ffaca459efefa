"""A line of a panel as it is drawn: gaps as nan, a colour from its role, dashes that tell it from its like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.records import Line, Panel
from batchnorm.report.ink import Ink

_HUGE = 1e100  # beyond it, as good as infinite: a gap

# Lines of one role: the first as it is, further ones by their dashes and tone, then by markers too.
_SOLID: list[Any] = ["-", (0, (7, 2, 1.5, 2)), (0, (7, 2, 1.5, 2, 1.5, 2))]
_DASHED: list[Any] = [(0, (4, 2.5)), (0, (1.5, 1.8)), (0, (9, 3))]


@dataclass(frozen=True)
class Curve:
    """What is drawn of a line, and how."""

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
        """The last point, None without one."""
        there = np.flatnonzero(np.isfinite(self.y))
        return (float(self.x[there[-1]]), float(self.y[there[-1]])) if there.size else None


def curves(panel: Panel, ink: Ink) -> list[Curve]:
    """The lines of `panel` in order."""
    alike: dict[tuple[str, bool], int] = {}
    found = []
    for line in panel.lines:
        # a line without a name belongs to the one before it, and looks like it
        number = max(alike.get((line.role, line.dashed), -1) + bool(line.label), 0)
        alike[line.role, line.dashed] = number
        tones = ink.tones(line.role)
        styles = _DASHED if line.dashed else _SOLID
        x = np.asarray(line.x, dtype=np.float64)
        away = ~(np.abs(x) <= _HUGE) | (x <= 0 if panel.x_log else False)
        found.append(
            Curve(
                label=printable(line.label),
                x=np.where(away, np.nan, x),
                y=_values(line.y, away),
                low=None if line.low is None else _values(line.low, away),
                high=None if line.high is None else _values(line.high, away),
                colour=tones[number % 2],
                name_colour=tones[0],
                style=styles[number % len(styles)],
                marker="o" if line.markers else "s" if number >= len(styles) else "",
            )
        )
    return found


def heights(line: Line) -> list[float]:
    """Every height at which something of the line is drawn."""
    values = [*line.y, *(line.low or ()), *(line.high or ())]
    return [value for value in values if value is not None and abs(value) <= _HUGE]


def printable(text: str) -> str:
    """The text on one line, without control characters, which an SVG file cannot hold."""
    words = (word for word in text.split(" ") if word)
    return " ".join("".join(c if c.isprintable() or c == "\u00a0" else " " for c in word) for word in words)


def _values(values: list[float | None], away: NDArray[np.bool_]) -> NDArray[np.float64]:
    array = np.asarray([math.nan if value is None else value for value in values], dtype=np.float64)
    return np.where(away | ~(np.abs(array) <= _HUGE), np.nan, array)
