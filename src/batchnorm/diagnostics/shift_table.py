"""What a ShiftMeter has seen of each layer, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from batchnorm.diagnostics.shift import Shift

_HEAD = ["layer", "median moved", "its path", "drift of mean", "of std", "noise of mean", "of std"]


def table(by_layer: Mapping[str, Sequence[Shift]], steps: int) -> str:
    """A line for each layer, and one that says in which units and of how many looks.

    steps: of training until now.
    """
    rows = [_HEAD, *(_row(layer, looks) for layer, looks in by_layer.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([f"{row[0]:{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    looks = len({each.step for found in by_layer.values() for each in found})
    lines.append(
        f"{looks} look{'s' * (looks != 1)} in {steps:,} step{'s' * (steps != 1)}; medians in 15-85 widths, drifts per "
        "step in standard deviations"
    )
    return "\n".join(lines)


def _row(layer: str, looks: Sequence[Shift]) -> list[str]:
    steps = sum(each.steps for each in looks if each.mean_drift is not None)

    def per_step(values: Iterable[float | None]) -> str:
        known = [each for each in values if each is not None]
        return f"{sum(known) / steps:.2g}" if known else "–"

    def latest(values: list[float | None]) -> str:
        known = [each for each in values if each is not None]
        return f"{known[-1]:.2f}" if known else "–"

    return [
        layer or "(the model)",
        latest([each.moved for each in looks]),
        latest([each.travel for each in looks]),
        per_step(each.mean_drift for each in looks),
        per_step(each.std_drift for each in looks),
        per_step(each.mean_noise for each in looks),
        per_step(each.std_noise for each in looks),
    ]
