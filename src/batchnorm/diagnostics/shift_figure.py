"""Figure 1 (b, c) of any network: the 15th, 50th and 85th percentiles of the inputs of its layers, over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm.atomic_file import replacing
from batchnorm.diagnostics.shift import Shift
from batchnorm.requirements import install_command

if TYPE_CHECKING:
    from batchnorm.records import Chart, Panel, Role

MOST = 12  # panels of a chart
_USUAL = 4


def some_layers(layers: Sequence[str]) -> list[str]:
    """As many as a figure shows at ease: evenly spread, the last one among them."""
    if len(layers) <= _USUAL:
        return list(layers)
    return [layers[round(number * (len(layers) - 1) / (_USUAL - 1))] for number in range(_USUAL)]


def draw(path: Path, by_layer: Mapping[str, Sequence[Shift]], role: Role) -> None:
    """Write a .png or .svg file with a panel for each layer. Raises: ImportError says what to install."""
    try:
        from batchnorm.report.figures import png, svg
    except ImportError as error:
        raise ImportError(
            f"a figure needs {error.name}, which is not installed: {install_command('cli')}"
        ) from None
    chart = _chart(by_layer, role)
    drawn = svg(chart).encode() if path.suffix == ".svg" else png(chart)
    with replacing(path) as unfinished:
        unfinished.write_bytes(drawn)


def _chart(by_layer: Mapping[str, Sequence[Shift]], role: Role) -> Chart:
    from batchnorm.records import Chart

    return Chart(
        claim="shift",
        name="shift",
        title="The inputs of layers while the network trains",
        caption="{15, 50, 85}th percentiles of one typical unit over the batch of a step, as in the paper's figure 1.",
        panels=[_panel(layer, rows, role) for layer, rows in by_layer.items()],
    )


def _panel(layer: str, rows: Sequence[Shift], role: Role) -> Panel:
    from batchnorm.records import Line, Panel

    low, median, high = (
        [value if math.isfinite(value) else None for value in values]
        for values in zip(*(each.percentiles for each in rows), strict=True)
    )
    values = [each for each in (*low, *high) if each is not None]
    margin = 0.06 * (max(values) - min(values)) if values else 0.0
    return Panel(
        title=layer,
        x_label="training steps",
        y_label=f"input, unit {rows[-1].unit}",
        # its own one: panels of one y label would share theirs, and layers differ in scale
        y_range=(min(values) - margin, max(values) + margin) if margin else None,
        lines=[
            Line(
                label="median, and 15th to 85th percentile",
                role=role,
                x=[float(each.step) for each in rows],
                y=median,
                low=low,
                high=high,
            )
        ],
    )
