"""What an axis covers and how it says its numbers: 100, 1k, 10k; 20 %; 10⁻⁵."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from batchnorm.records import Panel
from batchnorm.report.curve import heights

_Y_MARGIN = 0.06  # of the range, above and below
_STEPS = [1, 2, 2.5, 5, 10]
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def scale(axes: Axes, panel: Panel, *, drawn: bool, wide: bool) -> None:
    """Set the limits and ticks of `axes`, which hold the lines already; `drawn` says that there is a point."""
    axes.margins(x=0.015, y=_Y_MARGIN)
    if panel.x_log:
        axes.set_xscale("log")
    if not drawn:
        axes.set(xlim=(1, 10), ylim=(0, 1))
    limits = panel.y_range
    if limits and all(map(math.isfinite, limits)) and limits[0] < limits[1]:
        axes.set_ylim(*limits)
    if panel.x_log:
        left, right = axes.get_xlim()
        steps = (1.0,) if math.log10(right / left) > 2 else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=9 if wide else 7))
        axes.xaxis.set_minor_locator(LogLocator(subs=[float(digit) for digit in range(2, 10)], numticks=99))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8 if wide else 5, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    # only the ticks within the limits, for the widest of them sets the margin
    low, high = axes.get_ylim()
    ticks = MaxNLocator(5, steps=_STEPS).tick_values(low, high)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    say = percent if panel.y_percent else human
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: say(value)))


def on_one_scale(panels: Sequence[Panel]) -> list[Panel]:
    """Panels that measure the same thing get one range of y, or side by side they would mislead."""
    ranges: dict[str, tuple[float, float]] = {}
    for label in {panel.y_label for panel in panels}:
        alike = [panel for panel in panels if panel.y_label == label]
        values = [value for panel in alike for line in panel.lines for value in heights(line)]
        if len(alike) > 1 and values and min(values) < max(values):
            margin = _Y_MARGIN * (max(values) - min(values))
            ranges[label] = (min(values) - margin, max(values) + margin)
    return [
        panel.model_copy(update={"y_range": panel.y_range or ranges.get(panel.y_label)}) for panel in panels
    ]


def human(value: float) -> str:
    """A number as an axis says it: 100, 1k, 10k, 2.5M, 0.001, 10⁻⁵."""
    size = abs(value)
    sign = "−" if value < 0 else ""
    if size == 0:
        return "0"
    if size < 1e-4 or size >= 1e12:
        factor, exponent = f"{size:.1e}".split("e")
        power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
        return sign + (power if factor == "1.0" else f"{factor.removesuffix('.0')}·{power}")
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit * (1 - 1e-9):
            return f"{sign}{size / unit:.4g}{letter}"
    return f"{sign}{size:.4g}"


def percent(value: float) -> str:
    """A share as an axis says it."""
    return f"{human(round(value * 100, 6))}\u00a0%"
