"""The tables of the page: cells as text, and which columns are numeric."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from pydantic import JsonValue

from batchnorm.records import Table
from batchnorm.report.contents import Contents, Network

# "1,990", "−0.5", "15.8 ± 1.2", "96 %", "1.5e-3", "14–17", "∞"; a numeric column may have _MISSING cells too
_NUMBER = re.compile(r"[<>≤≥~≈+−-]?\s*(\d|\.\d|∞)")
_MISSING = {"", "—", "–", "-", "never", "not reached", "diverged"}

_MEANINGS = {
    "test": "test: accuracy on the test set, with batch normalization by the population statistics",
    "moving": "moving: the same by the moving averages",
    "training": "training: accuracy on the training set",
    "loss": "loss: on the training set, nats",
    "travel": "travel: how far the inputs to the last hidden layer’s sigmoids moved, in their mean 15–85 widths",
}


@dataclass(frozen=True)
class Grid:
    """A table of text cells: the first column names the row, numeric columns are right-aligned."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    @cached_property
    def numbers(self) -> list[bool]:
        """Whether each column is numeric."""
        return [self.numeric(column) for column in range(len(self.columns))]

    def numeric(self, column: int) -> bool:
        """Whether a column is numeric: it is not the first, and at least half of its non-missing cells are numbers."""
        cells = [row[column].strip() for row in self.rows if column < len(row)]
        numbers = sum(bool(_NUMBER.match(cell)) for cell in cells)
        words = sum(not _NUMBER.match(cell) and cell not in _MISSING for cell in cells)
        return column > 0 and any(cells) and numbers >= words


def of_verdict(tables: dict[str, Table]) -> list[Grid]:
    """The tables of a verdict."""
    return [Grid(title, table.columns, table.rows, table.note) for title, table in tables.items()]


def networks(contents: Contents) -> Grid | None:
    """The result of each network, or its last evaluation; empty columns are left out."""
    if not contents.networks:
        return None
    columns = ["network", "steps", "test", "moving", "training", "loss", "travel", "time", "ended"]
    rows = [_network(network) for network in contents.networks]
    all_ended = all(row[-1] == "yes" for row in rows)
    kept = [number for number in range(len(columns) - all_ended) if any(row[number] for row in rows)]
    note = "; ".join(_MEANINGS[columns[number]] for number in kept if columns[number] in _MEANINGS)
    return Grid(
        "Networks",
        [columns[number] for number in kept],
        [[row[number] or "—" for number in kept] for row in rows],
        note[0].upper() + note[1:] + ".",
    )


def configurations(contents: Contents) -> Grid | None:
    """The settings in which the networks that have ended differ."""
    configs = {
        network.job: _flatten(network.result.config)
        for network in contents.networks
        if network.result is not None
    }
    names = dict.fromkeys(name for config in configs.values() for name in config)
    differing = [name for name in names if len({config.get(name) for config in configs.values()}) > 1]
    if not differing:
        return None
    rows = [[job, *(config.get(name, "—") for name in differing)] for job, config in configs.items()]
    return Grid("Where the networks’ settings differ", ["network", *differing], rows)


def format_time(iso: str) -> str:
    """A readable form of a time in ISO 8601; other text is returned unchanged."""
    try:
        time = datetime.fromisoformat(iso)
        return f"{time.astimezone(UTC):%Y-%m-%d, %H:%M} UTC" if time.tzinfo else iso
    except (ValueError, OverflowError):  # the year 0, in another time zone
        return iso


def format_share(value: float | None) -> str:
    """An accuracy as a percentage."""
    if value is None or not math.isfinite(value):
        return "" if value is None else _format_non_finite(value)
    return f"{value * 100:.2f}\u00a0%"


def number(value: float | None) -> str:
    """A number to three digits."""
    if value is None or not math.isfinite(value):
        return "" if value is None else _format_non_finite(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}".replace("-", "−")


def format_duration(seconds: float) -> str:
    """A duration in s, min or h."""
    if not math.isfinite(seconds):
        return _format_non_finite(seconds)
    if seconds < 10:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}\u00a0h\u00a0{minutes:02d}\u00a0min"
    return f"{minutes}\u00a0min\u00a0{rest:02d}\u00a0s" if minutes else f"{rest}\u00a0s"


def _network(network: Network) -> list[str]:
    last, result = network.last, network.result
    travel = number(last.travel) if last else ""
    if result is not None:
        return [
            network.job,
            f"{result.steps:,}",
            format_share(result.accuracy),
            format_share(result.accuracy_moving),
            format_share(result.train_accuracy),
            number(result.loss),
            travel,
            format_duration(result.seconds),
            "diverged" if result.diverged else "yes",
        ]
    if last is None:  # pragma: no cover - every network has one or the other
        return [network.job, *[""] * 8]
    return [
        network.job,
        f"{last.step:,}",
        format_share(last.accuracy),
        format_share(last.accuracy_moving),
        "",
        number(last.loss),
        travel,
        "",
        "not yet",
    ]


def _format_non_finite(value: float) -> str:
    if math.isnan(value):
        return "not a number"
    return "∞" if value > 0 else "−∞"


def _flatten(config: dict[str, JsonValue], prefix: str = "") -> dict[str, str]:
    """Nested settings under dotted names."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            flat[prefix + name] = "yes" if value else "no"
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat
