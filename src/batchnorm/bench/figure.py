"""Results as a dot plot: a line for each case, a dot for each candidate, in the colours of the reports."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from batchnorm.bench import table
from batchnorm.bench.case import sizes
from batchnorm.bench.rows import Measured, Row
from batchnorm.report.figures import settings
from batchnorm.report.labels import width, write
from batchnorm.report.palette import LIGHT
from batchnorm.report.panel import style_axes
from batchnorm.report.scale import format_number

# Colour, marker and name of each candidate, in drawing order.
_STYLES = {
    "checkpoint": (LIGHT.other_2, "D", "checkpoint"),
    "inplace_abn": (LIGHT.other, "^", "inplace_abn"),
    "torch, saved": (LIGHT.plain, "s", "torch, saved"),
    "upgraded": (LIGHT.bn, "^", "upgraded"),
    "others": (LIGHT.other, "s", "what others offer, the fastest"),
    "plain": (LIGHT.plain, "o", "ours without it"),
    "predicted": (LIGHT.other, "s", "ours as predicted"),
    "without BN": (LIGHT.other_2, "D", "without BN"),
    "compile": (LIGHT.other, "s", "torch.compile"),
    "fx": (LIGHT.other_2, "D", "fx"),
    "torch, ONNX Runtime": (LIGHT.plain, "^", "ORT, torch's"),
    "ours, packed": (LIGHT.bn, "s", "packed"),
    "ours, ONNX Runtime": (LIGHT.bn, "^", "ORT"),
    "torch": (LIGHT.plain, "o", "torch"),
    "ours": (LIGHT.bn, "o", "ours"),
}

# in points
_ROW = 19.0  # from one case to the next
_ACROSS = 250.0  # width of the axes
_HEAD = 34.0  # above the axes: the panel's title
_FOOT = 46.0  # below the axes: tick labels and axis label
_MARGIN = 16.0
_TOP = 58.0  # title and legend


@dataclass(frozen=True)
class Dots:
    """One panel. `values` has a list per candidate, with one value per label, None if missing."""

    title: str
    x_label: str
    labels: list[str]
    values: dict[str, list[float | None]]
    from_zero: bool = False  # the axis

    @property
    def all(self) -> list[float]:
        """All values but None."""
        return [value for values in self.values.values() for value in values if value is not None]


def png(measured: Measured) -> bytes:
    """The figure of one command's results, two pixels to a point."""
    lines = _panels(measured.rows)
    with settings():
        # only the first panel of a line has labels, at its left
        left = _MARGIN + 10 + max((width(label) for line in lines for label in line[0].labels), default=0.0)
        columns = max(map(len, lines), default=1)
        heights = [_HEAD + _FOOT + _ROW * len(line[0].labels) for line in lines]
        across = left + columns * (_ACROSS + _MARGIN) + _MARGIN
        down = _TOP + sum(heights) + _MARGIN
        figure = Figure(figsize=(across / 72, down / 72), dpi=72, facecolor="white")
        FigureCanvasAgg(figure)
        write(
            figure,
            _MARGIN,
            down - _MARGIN - 12,
            _TITLES[measured.command],
            LIGHT.text,
            size=14,
            weight="bold",
        )
        _legend(
            figure,
            down - _MARGIN - 34,
            {candidate for line in lines for panel in line for candidate in panel.values},
        )
        top = down - _TOP
        for line, height in zip(lines, heights, strict=True):
            for column, panel in enumerate(line):
                x = left + column * (_ACROSS + _MARGIN)
                axes = figure.add_axes(
                    (
                        x / across,
                        (top - height + _FOOT) / down,
                        _ACROSS / across,
                        (height - _HEAD - _FOOT) / down,
                    )
                )
                _draw(axes, panel, named=column == 0)
                _scale_x(axes, [value for panel in line for value in panel.all], panel.from_zero)
                write(figure, x, top - _HEAD + 10, panel.title, LIGHT.text)
                write(figure, x + _ACROSS / 2, top - height + 8, panel.x_label, LIGHT.muted, ha="center")
            top -= height
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=144, metadata={"Software": None})
        return file.getvalue()


_TITLES = {
    "kernels": "Layers in training: time in copies of the input",
    "step": "A training step: time relative to ours",
    "memory": "A training step beyond weights and gradients, relative to torch's",
    "infer": "Evaluation",
    "fold": "Folded networks: time relative to ours",
    "statistics": "Statistics and masks: time relative to ours",
    "scaling": "Several processes: a step with Sync is 1",
}


def _panels(rows: Sequence[Row]) -> list[list[Dots]]:
    """Lines of panels: layers in copies, a line for each operation and dtype; networks relative to ours."""
    lines = []
    if rows[0].processes is not None:
        return [[_processes_panel(rows)]]
    if rows[0].memory is not None:
        return [[_memory(rows, "peak", "Peak memory"), _memory(rows, "saved", "Saved for the backward pass")]]
    modes = [row for row in rows if table.is_of_statistics(row)]
    if modes:
        return [[_relative(part, [row for row in modes if row.part == part])] for part in ("both", "step")]
    layers = [row for row in rows if "copy" in row.times]
    for name, dtype in dict.fromkeys((row.name, row.dtype) for row in layers):
        own = [row for row in layers if (row.name, row.dtype) == (name, dtype)]
        parts = [part for part in dict.fromkeys(row.part for row in own) if part != "both"]
        lines.append(
            [
                _panel(
                    f"{name} {part}, {dtype}", "copies", [row for row in own if row.part == part], "copies"
                )
                for part in parts
            ]
        )
    steps = [row for row in rows if "copy" not in row.times]
    if any(table.DEPLOYED.keys() & row.times.keys() - {"torch", "compile"} for row in steps):
        for size in dict.fromkeys(row.shape[0] for row in steps):  # one below the other: a row may be missing
            of_size = [row for row in steps if row.shape[0] == size]
            lines.append([_panel(f"Batches of {size}", "time / our time", of_size, "over_ours")])
    elif steps:
        lines.append([_panel("Networks", "time / our time", steps, "over_ours")])
    return lines


def _relative(part: str, rows: Sequence[Row]) -> Dots:
    """The times of each row's candidates for `part`, relative to ours."""
    labels = [f"{row.name}  {sizes(row.shape)}  {row.layout}" for row in rows]
    plain = [None if (time := table.reference_time(row)) is None else time.over_ours for row in rows]
    other_implementations = [
        min(
            (row.times[candidate].over_ours or 0 for candidate in table.other_implementations(row)),
            default=None,
        )
        for row in rows
    ]
    title = "Forward and backward" if part == "both" else "ResNet-18, forward and backward"
    return Dots(
        title,
        "time / our time",
        labels,
        {"others": other_implementations, "plain": plain, "ours": [1.0] * len(rows)},
    )


def _memory(rows: Sequence[Row], field: str, title: str) -> Dots:
    """What each candidate takes, relative to torch's."""
    found = [row.memory for row in rows if row.memory is not None]
    values = {
        candidate: [
            getattr(each[candidate], field) / getattr(each["torch"], field) if candidate in each else None
            for each in found
        ]
        for candidate in _STYLES
        if any(candidate in each for each in found)
    }
    return Dots(title, "memory / torch's", [row.name for row in rows], values, from_zero=True)


def _processes_panel(rows: Sequence[Row]) -> Dots:
    """The time of a step without Sync, and with Sync as predicted, relative to the measured time with Sync."""
    plain = [row.times["plain"].over_ours for row in rows]
    predicted = [(row.times["plain"].ms + table.predict_ms(row)) / row.times["ours"].ms for row in rows]
    return Dots(
        "A step",
        "time / time with Sync",
        [row.name for row in rows],
        {"plain": plain, "predicted": [*predicted], "ours": [1.0] * len(rows)},
    )


def _panel(title: str, x_label: str, rows: Sequence[Row], field: str) -> Dots:
    labels = [f"{row.name if field == 'over_ours' else sizes(row.shape)}  {row.layout}" for row in rows]
    values = {
        candidate: [getattr(row.times[candidate], field) if candidate in row.times else None for row in rows]
        for candidate in _STYLES
        if any(candidate in row.times for row in rows)
    }
    return Dots(title, x_label, labels, values)


def _draw(axes: Axes, panel: Dots, *, named: bool) -> None:
    places = [-number for number in range(len(panel.labels))]
    for index, y in enumerate(places):
        present = [value for values in panel.values.values() if (value := values[index]) is not None]
        axes.plot(
            [min(present), max(present)],
            [y, y],
            color=LIGHT.rule,
            linewidth=4,
            solid_capstyle="round",
            zorder=1,
        )
    for order, (candidate, values) in enumerate(panel.values.items(), start=2):
        colour, marker, _ = _STYLES[candidate]
        points = [(value, y) for value, y in zip(values, places, strict=True) if value is not None]
        axes.plot(
            *zip(*points, strict=True), linestyle="", marker=marker, markersize=6, color=colour,
            markeredgecolor="white", markeredgewidth=0.6, zorder=order,
        )  # fmt: skip
    axes.axvline(1, color=LIGHT.muted, linewidth=0.8, zorder=0)
    axes.set_ylim(places[-1] - 0.6, 0.6)
    axes.set_yticks(places, panel.labels if named else [""] * len(places))
    style_axes(axes, LIGHT, rules="x")


def _scale_x(axes: Axes, values: list[float], from_zero: bool) -> None:
    """Scale the x axis: linear, or logarithmic if the values differ by more than a factor of 3."""
    low, high = min([1.0, *values]), max([1.0, *values])
    if from_zero:
        axes.set_xlim(0, high * 1.05)
    elif high / low > 3:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.15, high * 1.15)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        low, high = min(low, 0.9), max(high, 1.1)  # so that differences of 1 %, which are noise, look small
        axes.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))


def _legend(figure: Figure, y: float, present: set[str]) -> None:
    """The legend, from left to right, ours first."""
    across, down = figure.get_size_inches() * 72
    x = _MARGIN
    for candidate in reversed(_STYLES):
        if candidate in present:
            colour, marker, name = _STYLES[candidate]
            figure.add_artist(
                Line2D(
                    [(x + 4) / across],
                    [(y + 4) / down],
                    color=colour,
                    marker=marker,
                    markersize=6,
                    linestyle="",
                )
            )
            write(figure, x + 13, y, name, colour)
            x += 13 + width(name) + 18
