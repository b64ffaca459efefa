"""The terminal output of an experiment: a bar for the whole, a bar per network in training, the verdicts."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Grid
from rich.text import Text

from batchnorm.experiments.claim import Job
from batchnorm.records import Result, Table, Verdict
from batchnorm.training.workers import Progress as Step


class Display:
    """Progress bars on `console`; without a terminal, a line for each finished network."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[step]}", justify="right"),
            TextColumn("{task.fields[accuracy]}", justify="right"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._all: TaskID | None = None
        self._jobs: dict[str, Job] = {}
        self._steps: dict[str, int] = {}
        self._running: dict[str, TaskID] = {}
        self._ended = 0

    def __enter__(self) -> Self:
        self._bars.start()
        self._all = self._bars.add_task("[bold]all networks", total=None, step="", accuracy="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def on_jobs(self, jobs: Mapping[str, Job]) -> None:
        """Extend the total by these networks."""
        self._jobs |= jobs
        self._refresh()

    def on_progress(self, progress: Step) -> None:
        """Advance the bar of one network, and that of the whole."""
        job = progress.job
        if job not in self._running:
            steps = self._jobs[job].steps
            self._running[job] = self._bars.add_task(job, total=steps, step="", accuracy="")
        bar = self._running[job]
        self._bars.update(bar, completed=progress.step, step=f"step {progress.step:,}")
        if progress.evaluation is not None:
            self._bars.update(bar, accuracy=f"{progress.evaluation.accuracy:.1%}")
        self._steps[job] = progress.step
        self._refresh()

    def on_result(self, job: str, result: Result) -> None:
        """Remove the bar of one network and print its result."""
        if job in self._running:
            self._bars.remove_task(self._running.pop(job))
        self._steps[job] = self._jobs[job].steps
        self._ended += 1
        outcome = "[red]diverged[/]" if result.diverged else f"{result.accuracy:6.1%} on the test set"
        self._console.print(f"  {job:28} {result.steps:>6,} steps  {outcome}", highlight=False)
        self._refresh()

    def on_stop_request(self) -> None:
        """Confirm Ctrl-C."""
        self._console.print("stopping: writing checkpoints (Ctrl-C again to quit without them)")

    def _refresh(self) -> None:
        assert self._all is not None
        done = sum(self._jobs[job].cost * step / self._jobs[job].steps for job, step in self._steps.items())
        self._bars.update(
            self._all,
            total=sum(config.cost for config in self._jobs.values()),
            completed=done,
            step=f"{self._ended} of {len(self._jobs)}",
        )


_HEADING = 8  # characters that a column's heading may always have
_UNLIMITED = 10_000
_MARKS = {"seen": ("✓", "green"), "not seen here": ("✗", "red"), "incomplete": ("…", "yellow")}


def summary(verdicts: Sequence[Verdict]) -> RenderableType:
    """The verdicts, and the first table of the last one; the other tables are in the report."""
    parts: list[RenderableType] = [_VerdictPanel(verdict) for verdict in verdicts]
    for title, table in list(verdicts[-1].tables.items())[:1] if verdicts else ():
        parts.append(_TitledTable(title, table))
    return Group(*parts)


class _VerdictPanel:
    """A verdict in a panel."""

    def __init__(self, verdict: Verdict) -> None:
        self._verdict = verdict

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        verdict, inside = self._verdict, options.max_width - 4
        mark, colour = _MARKS[verdict.outcome]
        text = Text.assemble(
            (_wrap(verdict.title, inside), "bold"),
            "\n\n" + _wrap(verdict.measured, inside),
            ("\n\n" + _wrap(f"expected: {verdict.expected}", inside), "dim"),
            ("\n" + _wrap(f"in the paper: {verdict.source}", inside), "dim"),
        )
        heading = f"[bold]{mark} {verdict.outcome}[/]"
        yield Panel(text, title=heading, title_align="left", border_style=colour)


class _TitledTable:
    """A table with its title; if it is too wide, cells are wrapped before "±"."""

    def __init__(self, title: str, table: Table) -> None:
        self._title, self._table = title, table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows, width = self._table.rows, options.max_width
        grid = self._grid(rows)
        if Measurement.get(console, options.update(width=_UNLIMITED), grid).maximum > width:
            grid = self._grid([[cell.replace(" ± ", "\n± ") for cell in row] for row in rows])
        yield Text(f"\n{_wrap(self._title, width)}\n", "bold")
        yield grid
        yield Text(f"\n{_wrap(self._table.note, width)}", "dim")

    def _grid(self, rows: Sequence[Sequence[str]]) -> Grid:
        grid = Grid(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for index, column in enumerate(self._table.columns):
            longest = max((len(line) for row in rows for line in row[index].splitlines()), default=0)
            heading = textwrap.fill(column, max(longest, _HEADING), break_long_words=False)
            grid.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in rows:
            grid.add_row(*map(Text, row))
        return grid


def _wrap(text: str, width: int) -> str:
    """The text wrapped at `width`, without a line break before "%"."""
    protected = text.replace(" %", "\u00a0%")
    return textwrap.fill(protected, max(width, 1), break_on_hyphens=False).replace("\u00a0", " ")
