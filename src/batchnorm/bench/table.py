"""Results as tables: one for each rival, operation, dtype and layout, narrow enough for 80 columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchnorm.bench import link, scaling, traffic
from batchnorm.bench.case import sizes
from batchnorm.bench.rows import Measured, Row, Time
from batchnorm.report.tables import Grid

RIVALS = {"torch": "torch", "compile": "torch.compile"}

NOTE = (
    "Times are medians in milliseconds; ± is half the distance between their quartiles; a copy is y.copy_(x). "
    "Ratios are medians of the ratios within a round, and > 1 where ours is faster."
)

SCALING = (
    "A step is the wall time of the slowest rank. added is what Sync added to it, the difference of two medians; "
    "predicted is what collectives by themselves say it must: the latency and bytes / bandwidth of each exchange, one "
    "after the other. core ms is the time of a core that one rank's step took, step · min(ranks, cores) / ranks: the "
    "same in every line if ranks cost each other nothing."
)


def grids(measured: Measured) -> list[Grid]:
    """The tables of one command's results."""
    found = []
    if measured.command == "scaling":
        return [_steps_of_ranks(measured.rows), _links(measured.rows)]
    modes = [row for row in measured.rows if is_of_statistics(row)]
    if modes:
        return [_statistics(rows) for rows in _groups(modes, lambda row: (row.name, row.layout))]
    of_layers = _groups(
        (row for row in measured.rows if "copy" in row.times), lambda row: (row.name, row.dtype, row.layout)
    )
    for rows in of_layers:
        found += [_layers(rows, rival) for rival in RIVALS if _has(rows, rival)]
    of_networks = _groups(
        (row for row in measured.rows if "copy" not in row.times), lambda row: (row.layout,)
    )
    return found + [_networks(rows) for rows in of_networks]


def drawn(grid: Grid) -> RenderableType:
    """A table for the terminal."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column, name in enumerate(grid.columns):
        right = column >= _words(grid)
        table.add_column(Text(name), justify="right" if right else "left", no_wrap=True, header_style="dim")
    for row in grid.rows:
        table.add_row(*map(Text, row), style="bold" if row[0] == _MEAN else "")
    # above it, and not the table's own title, which would be broken to the table's width
    return Group(Text(grid.title, style="bold"), table)


def markdown(grid: Grid) -> str:
    """A table for a page."""
    rule = [":--" if column < _words(grid) else "--:" for column in range(len(grid.columns))]
    rows = [f"| {' | '.join(cells)} |" for cells in [grid.columns, rule, *grid.rows]]
    return "\n".join([f"**{grid.title}**", "", *rows])


def mean(values: Iterable[float | None]) -> float:
    """The geometric mean, which says the same of ratios and of their inverses."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


_MEAN = "geometric mean"


def _layers(rows: Sequence[Row], rival: str) -> Grid:
    name = RIVALS[rival]
    first = rows[0]
    parts = list(dict.fromkeys(row.part for row in rows))
    columns = [
        "shape",
        "pass",
        "copy",
        "ours",
        "±",
        "copies",
        rival,
        "±",
        "copies",
        f"{rival}/ours",
    ]
    body = []
    for row in rows:
        if rival in row.times:
            ours, theirs = row.times["ours"], row.times[rival]
            copy = _ms(row.times["copy"].ms)
            body.append(
                [sizes(row.shape), row.part, copy, *_cells(ours), *_cells(theirs), _ratio(theirs.over_ours)]
            )
    for part in parts if len(rows) > len(parts) else ():
        both = [
            (row.times["ours"], row.times[rival]) for row in rows if row.part == part and rival in row.times
        ]
        copies = [_copies(mean(times[index].copies for times in both)) for index in (0, 1)]
        over = _ratio(mean(theirs.over_ours for _, theirs in both))
        body.append([_MEAN, part, "", "", "", copies[0], "", "", copies[1], over])
    title = f"{first.name} against {name}, {first.layout}, {first.dtype}"
    if len(parts) == 1:
        title = f"{title}, {parts[0]}"
        columns, *body = [line[:1] + line[2:] for line in [columns, *body]]
    return Grid(title, columns, body)


def is_of_statistics(row: Row) -> bool:
    """Whether `row` is about statistics or a mask, beside the same without them."""
    return without(row) is not None


def without(row: Row) -> Time | None:
    """Of a row about statistics, what ours took without them."""
    return row.times.get("plain") or row.times.get("one batch")


def others(row: Row) -> list[str]:
    """Of a row about statistics, those that are not ours."""
    return [who for who in row.times if who not in ("ours", "plain", "one batch", "collectives", "copy")]


def _statistics(rows: Sequence[Row]) -> Grid:
    first = rows[0]
    rivals = [
        who for who in dict.fromkeys(who for row in rows for who in row.times) if who not in ("ours", "copy")
    ]
    columns = ["shape", "pass", "ours", "±", "copies"]
    for who in rivals:
        columns += [who, "/ours"]
    body = []
    for row in rows:
        cells = [sizes(row.shape), row.part, *_cells(row.times["ours"])]
        for who in rivals:
            time = row.times.get(who)
            cells += [_ms(time.ms), _ratio(time.over_ours)] if time else ["", ""]
        body.append(cells)
    return Grid(f"{first.name}, {first.layout}, {first.dtype}", columns, body)


def predicted(row: Row) -> float:
    """Of a row about several processes, the milliseconds that Sync should add to a step."""
    with torch.device("meta"):
        model = scaling.network()
    return link.predicted(row, traffic.exchanges(model))


def _steps_of_ranks(rows: Sequence[Row]) -> Grid:
    columns = ["ranks", "DDP", "±", "core ms", "and Sync", "±", "core ms", "added", "predicted"]
    body = []
    for row in rows:
        assert row.processes is not None
        plain, ours = row.times["plain"], row.times["ours"]
        cells = [str(row.processes.count)]
        for time in (plain, ours):
            cells += [*_cells(time)[:2], _ms(time.ms * row.processes.share)]
        body.append([*cells, _difference(ours.ms - plain.ms), _difference(predicted(row))])
    (name,) = {row.name.split(",")[0] for row in rows}
    return Grid(f"A step of {name}, {sizes(rows[0].shape)} a rank, {rows[0].dtype}", columns, body)


def _links(rows: Sequence[Row]) -> Grid:
    small, large = f"{link.SMALL} bytes", f"{link.LARGE // 2**20} MiB"
    body = []
    for row in rows:
        assert row.processes is not None
        for name in ("all_gather", "all_reduce"):
            brief, long = (row.times[who] for who, each in link.BARE.items() if each.name == name)
            rate = ""
            if row.processes.count > 1:
                rate = f"{link.links(row)[name].bandwidth / 1e3:,.0f}"
            body.append(
                [f"{name}, {_ranks(row.processes.count)}", *_cells(brief)[:2], *_cells(long)[:2], rate]
            )
    return Grid("Collectives between computations", ["collective", small, "±", large, "±", "MB/s"], body)


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _difference(value: float) -> str:
    """A difference of times, which noise may make negative and no digits beyond its own."""
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def _networks(rows: Sequence[Row]) -> Grid:
    first = rows[0]
    others = [who for who in ("torch", "compile", "without BN") if _has(rows, who)]
    columns = ["network", "ours", "±"]
    for who in others:
        columns += [who, "±", "/ours"]
    body = []
    for row in rows:
        cells = [row.name, *_cells(row.times["ours"])[:2]]
        for who in others:
            time = row.times.get(who)
            cells += [*_cells(time)[:2], _ratio(time.over_ours)] if time else [""] * 3
        body.append(cells)
    if len(rows) > 1:
        cells = [_MEAN, "", ""]
        for who in others:
            cells += ["", "", _ratio(mean(row.times[who].over_ours for row in rows if who in row.times))]
        body.append(cells)
    if first.layout == "own settings":
        title = f"Our settings (channels-last, memory kept) against torch as it comes, {first.dtype}"
    else:
        title = f"Networks, {first.layout}, {first.dtype}, {first.part}"
    return Grid(title, columns, body)


def _words(grid: Grid) -> int:
    """How many columns at the left are words."""
    return 2 if "pass" in grid.columns else 1


def _cells(time: Time) -> list[str]:
    return [_ms(time.ms), f"{(time.high - time.low) / 2 / time.ms:.0%}", _copies(time.copies)]


def _ms(value: float) -> str:
    """To three digits, the last of them too when it is 0."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".removesuffix(".")


def _copies(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}×"


def _has(rows: Sequence[Row], who: str) -> bool:
    return any(who in row.times for row in rows)


def _groups(rows: Iterable[Row], key: Callable[[Row], tuple[str, ...]]) -> list[list[Row]]:
    """Rows of one key together, keys in the order in which they first come."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())
