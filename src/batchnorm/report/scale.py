"""The limits, ticks and tick labels of axes: 100, 1k, 10k; 20 %; 10⁻⁵."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from batchnorm.records import Panel
from batchnorm.report.curve import INFINITE, heights

_Y_MARGIN = 0.06  # of the range, above and below
_STEPS = [1, 2, 2.5, 5, 10]
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def scale(axes: Axes, panel: Panel, *, drawn: bool, wide: bool) -> None:
    """Set the limits and ticks of `axes`, which have the lines already; `drawn` is False if there is no point."""
    axes.margins(x=0.015, y=_Y_MARGIN)
    if panel.x_log:
        axes.set_xscale("log")
    if not drawn:
        axes.set(xlim=(1, 10), ylim=(0, 1))
    limits = panel.y_range
    if limits and all(abs(limit) <= INFINITE for limit in limits) and limits[0] < limits[1]:
        axes.set_ylim(*limits)
    if panel.x_log:
        left, right = axes.get_xlim()
        steps = (1.0,) if math.log10(right / left) > 2 else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=9 if wide else 7))
        axes.xaxis.set_minor_locator(LogLocator(subs=[float(digit) for digit in range(2, 10)], numticks=99))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8 if wide else 5, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    # only ticks within the limits, since the widest tick label determines the margin
    low, high = axes.get_ylim()
    ticks = MaxNLocator(5, steps=_STEPS).tick_values(low, high)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    format_value = percent if panel.y_percent else format_number
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))


def share_y_range(panels: Sequence[Panel]) -> list[Panel]:
    """Give panels with the same y label the same y range, so that they can be compared."""
    ranges: dict[str, tuple[float, float]] = {}
    for label in {panel.y_label for panel in panels}:
        same_quantity = [panel for panel in panels if panel.y_label == label]
        values = [value for panel in same_quantity for line in panel.lines for value in heights(line)]
        if len(same_quantity) > 1 and values and min(values) < max(values):
            margin = _Y_MARGIN * (max(values) - min(values))
            ranges[label] = (min(values) - margin, max(values) + margin)
    return [
        panel.model_copy(update={"y_range": panel.y_range or ranges.get(panel.y_label)}) for panel in panels
    ]


def format_number(value: float) -> str:
    """A tick label: 100, 1k, 10k, 2.5M, 0.001, 10⁻⁵."""
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
    """A share as a tick label in per cent."""
    return f"{format_number(round(value * 100, 6))}\u00a0%"
