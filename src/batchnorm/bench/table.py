"""Results as tables: one per baseline, operation, dtype and layout, at most 80 columns wide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchnorm.bench import link, scaling, traffic
from batchnorm.bench.case import sizes
from batchnorm.bench.rows import Command, Measured, Row, Time
from batchnorm.report.tables import Grid

# The candidates beside a folded network.
DEPLOYED = {
    "ours, packed": "packed",
    "torch": "torch",
    "fx": "fx",
    "compile": "compile",
    "ours, ONNX Runtime": "ORT",
    "torch, ONNX Runtime": "torch's",
}

BASELINES = {"torch": "torch", "compile": "torch.compile"}

FOLDED = (
    "folded is bn.fold's network, packed the one with pack=True; fx torch.fx's fuse; ORT ONNX Runtime of what "
    "bn.export wrote, torch's of what torch.onnx.export did. Before each call that is timed come 30 ms of calls that "
    "are not."
)

NOTE = (
    "Times are medians in milliseconds; ± is half the distance between their quartiles; a copy is y.copy_(x). "
    "Ratios are medians of the ratios within a round, and > 1 where ours is faster."
)

SCALING = (
    "A step is the wall time of the slowest rank. added is the time that Sync adds, the difference of two medians; "
    "predicted is the sum of latency + bytes / bandwidth over Sync's collectives, measured alone. core ms is the core "
    "time of one rank's step, step · min(ranks, cores) / ranks: the same in every line if ranks did not slow each "
    "other down."
)


# The candidates beside torch's layers, in a row about memory.
SPARING = {
    "upgraded": "upgraded",
    "ours": "saved",
    "torch, saved": "torch saved",
    "checkpoint": "checkpoint",
    "compile": "compile",
    "inplace_abn": "in-place",
}

MEMORY = (
    "Memory is in megabytes of 10⁶ bytes as torch's allocator counts it, beyond weights; the peak also beyond their "
    "gradients. The other columns are ratios to torch: upgraded is bn.upgrade's network, saved the same after "
    "bn.save_memory, torch saved torch's layers after it; checkpoint torch.utils.checkpoint around each block; "
    "in-place inplace_abn's layers, whose activation is a leaky ReLU."
)

FOOTNOTES: dict[Command, str] = {"scaling": SCALING, "fold": FOLDED, "memory": MEMORY}


def grids(measured: Measured) -> list[Grid]:
    """The tables of one command's results."""
    found = []
    if measured.command == "scaling":
        return [_steps_of_ranks(measured.rows), _collectives(measured.rows)]
    modes = [row for row in measured.rows if is_of_statistics(row)]
    if modes:
        return [_statistics(rows) for rows in _groups(modes, lambda row: (row.name, row.layout))]
    of_layers = _groups(
        (row for row in measured.rows if "copy" in row.times), lambda row: (row.name, row.dtype, row.layout)
    )
    for rows in of_layers:
        found += [_layers(rows, baseline) for baseline in BASELINES if _has(rows, baseline)]
    if measured.command == "memory":
        return _sparing(measured.rows)
    if measured.command == "fold":
        return [_folded(rows) for rows in _groups(measured.rows, lambda row: (str(row.shape[0]),))]
    of_networks = _groups(
        (row for row in measured.rows if "copy" not in row.times), lambda row: (row.layout,)
    )
    return found + [_networks(rows) for rows in of_networks]


def render(grid: Grid) -> RenderableType:
    """A table for the terminal."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column, name in enumerate(grid.columns):
        right = column >= _label_columns(grid)
        table.add_column(Text(name), justify="right" if right else "left", no_wrap=True, header_style="dim")
    for row in grid.rows:
        table.add_row(*map(Text, row), style="bold" if row[0] == _MEAN else "")
    # not the table's own title, which rich would wrap at the width of the table
    return Group(Text(grid.title, style="bold"), table)


def markdown(grid: Grid) -> str:
    """A table in Markdown."""
    rule = [":--" if column < _label_columns(grid) else "--:" for column in range(len(grid.columns))]
    rows = [f"| {' | '.join(cells)} |" for cells in [grid.columns, rule, *grid.rows]]
    return "\n".join([f"**{grid.title}**", "", *rows])


def mean(values: Iterable[float | None]) -> float:
    """The geometric mean, which is consistent for ratios and their inverses."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


_MEAN = "geometric mean"


def _layers(rows: Sequence[Row], baseline: str) -> Grid:
    name = BASELINES[baseline]
    first = rows[0]
    parts = list(dict.fromkeys(row.part for row in rows))
    columns = [
        "shape",
        "pass",
        "copy",
        "ours",
        "±",
        "copies",
        baseline,
        "±",
        "copies",
        f"{baseline}/ours",
    ]
    body = []
    for row in rows:
        if baseline in row.times:
            ours, other = row.times["ours"], row.times[baseline]
            copy = _ms(row.times["copy"].ms)
            body.append(
                [sizes(row.shape), row.part, copy, *_cells(ours), *_cells(other), _ratio(other.over_ours)]
            )
    for part in parts if len(rows) > len(parts) else ():
        both = [
            (row.times["ours"], row.times[baseline])
            for row in rows
            if row.part == part and baseline in row.times
        ]
        copies = [_copies(mean(times[index].copies for times in both)) for index in (0, 1)]
        over = _ratio(mean(other.over_ours for _, other in both))
        body.append([_MEAN, part, "", "", "", copies[0], "", "", copies[1], over])
    title = f"{first.name} against {name}, {first.layout}, {first.dtype}"
    if len(parts) == 1:
        title = f"{title}, {parts[0]}"
        columns, *body = [line[:1] + line[2:] for line in [columns, *body]]
    return Grid(title, columns, body)


def is_of_statistics(row: Row) -> bool:
    """Whether `row` measures statistics or a mask, with the layer without them as reference."""
    return reference_time(row) is not None


def reference_time(row: Row) -> Time | None:
    """The time of our layer without the statistics or mask of the row, if it has one."""
    return row.times.get("plain") or row.times.get("one batch")


def other_implementations(row: Row) -> list[str]:
    """The candidates of other libraries in a row about statistics."""
    return [
        candidate
        for candidate in row.times
        if candidate not in ("ours", "plain", "one batch", "collectives", "copy")
    ]


def _statistics(rows: Sequence[Row]) -> Grid:
    first = rows[0]
    baselines = [
        candidate
        for candidate in dict.fromkeys(candidate for row in rows for candidate in row.times)
        if candidate not in ("ours", "copy")
    ]
    columns = ["shape", "pass", "ours", "±", "copies"]
    for candidate in baselines:
        columns += [candidate, "/ours"]
    body = []
    for row in rows:
        cells = [sizes(row.shape), row.part, *_cells(row.times["ours"])]
        for candidate in baselines:
            time = row.times.get(candidate)
            cells += [_ms(time.ms), _ratio(time.over_ours)] if time else ["", ""]
        body.append(cells)
    return Grid(f"{first.name}, {first.layout}, {first.dtype}", columns, body)


def predict_ms(row: Row) -> float:
    """The predicted milliseconds that Sync adds to a step, of a row about several processes."""
    with torch.device("meta"):
        model = scaling.network()
    return link.predict_ms(row, traffic.exchanges(model))


def _steps_of_ranks(rows: Sequence[Row]) -> Grid:
    columns = ["ranks", "DDP", "±", "core ms", "and Sync", "±", "core ms", "added", "predicted"]
    body = []
    for row in rows:
        assert row.processes is not None
        plain, ours = row.times["plain"], row.times["ours"]
        cells = [str(row.processes.count)]
        for time in (plain, ours):
            cells += [*_cells(time)[:2], _ms(time.ms * row.processes.share)]
        body.append([*cells, _difference(ours.ms - plain.ms), _difference(predict_ms(row))])
    (name,) = {row.name.split(",")[0] for row in rows}
    return Grid(f"A step of {name}, {sizes(rows[0].shape)} a rank, {rows[0].dtype}", columns, body)


def _collectives(rows: Sequence[Row]) -> Grid:
    small, large = f"{link.SMALL} bytes", f"{link.LARGE // 2**20} MiB"
    body = []
    for row in rows:
        assert row.processes is not None
        for name in ("all_gather", "all_reduce"):
            small_time, large_time = (
                row.times[candidate] for candidate, each in link.COLLECTIVES.items() if each.name == name
            )
            rate = ""
            if row.processes.count > 1:
                rate = f"{link.links(row)[name].bandwidth / 1e3:,.0f}"
            body.append(
                [
                    f"{name}, {_ranks(row.processes.count)}",
                    *_cells(small_time)[:2],
                    *_cells(large_time)[:2],
                    rate,
                ]
            )
    return Grid("Collectives between computations", ["collective", small, "±", large, "±", "MB/s"], body)


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _difference(value: float) -> str:
    """A difference of times, possibly negative by noise, without meaningless digits."""
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def _networks(rows: Sequence[Row]) -> Grid:
    first = rows[0]
    if first.layout == "own settings":
        title = f"Our settings (channels-last, memory kept) against torch's defaults, {first.dtype}"
    else:
        title = f"Networks, {first.layout}, {first.dtype}, {first.part}"
    others = {candidate: candidate for candidate in ("torch", "compile", "without BN")}
    return _against(rows, title, "ours", others, spread=True)


def _folded(rows: Sequence[Row]) -> Grid:
    first = rows[0]
    title = f"Folded networks, batches of {first.shape[0]}, {first.layout}, {first.dtype}"
    return _against(rows, title, "folded", DEPLOYED, spread=False)


def _time_of(row: Row, candidate: str) -> float | None:
    return row.times[candidate].ms if candidate in row.times else None


def _sparing(rows: Sequence[Row]) -> list[Grid]:
    """Peak, saved and time of torch's layers, and those of the others relative to them."""
    if not rows:
        return []
    others = {candidate: heading for candidate, heading in SPARING.items() if _has(rows, candidate)}

    def grid(title: str, unit: str, value: Callable[[Row, str], float | None]) -> Grid:
        body = []
        for row in rows:
            of_torch = value(row, "torch")
            ratios = [value(row, candidate) for candidate in others]
            cells = ["" if each is None or not of_torch else f"{each / of_torch:.2f}" for each in ratios]
            body.append([row.name, _ms(of_torch or 0), *cells])
        return Grid(
            f"{title}, {sizes(rows[0].shape)} float32", ["network", f"torch, {unit}", *others.values()], body
        )

    def memory(field: str) -> Callable[[Row, str], float | None]:
        def of(row: Row, candidate: str) -> float | None:
            found = (row.memory or {}).get(candidate)
            return None if found is None else float(getattr(found, field))

        return of

    return [
        grid("Peak of a step beyond weights and gradients", "MB", memory("peak")),
        grid("Saved for the backward pass", "MB", memory("saved")),
        grid("Time of a step", "ms", _time_of),
    ]


def _against(rows: Sequence[Row], title: str, ours: str, others: dict[str, str], spread: bool) -> Grid:
    """A line for each network: our time, and those of others, by candidate with their headings, relative to it.

    spread: whether the others have a column for it, too.
    """
    others = {candidate: heading for candidate, heading in others.items() if _has(rows, candidate)}
    of_times = 2 if spread else 1  # columns of a time, without its ratio
    columns = ["network", ours, "±"]
    for heading in others.values():
        columns += [*[heading, "±"][:of_times], "/ours"]
    body = []
    for row in rows:
        cells = [row.name, *_cells(row.times["ours"])[:2]]
        for candidate in others:
            time = row.times.get(candidate)
            cells += [*_cells(time)[:of_times], _ratio(time.over_ours)] if time else [""] * (of_times + 1)
        body.append(cells)
    if len(rows) > 1:
        cells = [_MEAN, "", ""]
        for candidate in others:
            found = (row.times[candidate].over_ours for row in rows if candidate in row.times)
            cells += [*[""] * of_times, _ratio(mean(found))]
        body.append(cells)
    return Grid(title, columns, body)


def _label_columns(grid: Grid) -> int:
    """The number of columns at the left that hold text."""
    return 2 if "pass" in grid.columns else 1


def _cells(time: Time) -> list[str]:
    return [_ms(time.ms), f"{(time.high - time.low) / 2 / time.ms:.0%}", _copies(time.copies)]


def _ms(value: float) -> str:
    """Three significant digits, trailing zeros included."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".removesuffix(".")


def _copies(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}×"


def _has(rows: Sequence[Row], candidate: str) -> bool:
    return any(candidate in row.times for row in rows)


def _groups(rows: Iterable[Row], key: Callable[[Row], tuple[str, ...]]) -> list[list[Row]]:
    """Rows grouped by key, in the order of their first occurrence."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())
