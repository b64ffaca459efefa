"""How a run looks in a terminal: a bar for the whole, a line for every network in training, a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from batchnorm.experiments.claim import Job
from batchnorm.records import Result, Verdict
from batchnorm.training.workers import Progress as Step


class Display:
    """Progress bars on `console`; where that is not a terminal, a line for every network that has ended."""

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

    def planned(self, jobs: Mapping[str, Job]) -> None:
        """Lengthen the bar by these networks."""
        self._jobs |= jobs
        self._refresh()

    def progress(self, progress: Step) -> None:
        """Move the bar of one network, and that of the whole."""
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

    def ended(self, job: str, result: Result) -> None:
        """Take the bar of one network away and print its end."""
        if job in self._running:
            self._bars.remove_task(self._running.pop(job))
        self._steps[job] = self._jobs[job].steps
        self._ended += 1
        outcome = "[red]diverged[/]" if result.diverged else f"{result.accuracy:6.1%} on the test set"
        self._console.print(f"  {job:28} {result.steps:>6,} steps  {outcome}", highlight=False)
        self._refresh()

    def stopping(self) -> None:
        """Say that Ctrl-C was heard."""
        self._console.print("stopping: writing checkpoints (Ctrl-C again to give them up)")

    def _refresh(self) -> None:
        assert self._all is not None
        done = sum(self._jobs[job].cost * step / self._jobs[job].steps for job, step in self._steps.items())
        self._bars.update(
            self._all,
            total=sum(config.cost for config in self._jobs.values()),
            completed=done,
            step=f"{self._ended} of {len(self._jobs)}",
        )


_MARKS = {"seen": ("✓", "green"), "not seen here": ("✗", "red"), "incomplete": ("…", "yellow")}


def summary(verdicts: Sequence[Verdict]) -> RenderableType:
    """The verdicts, and the tables of the last one."""
    parts: list[RenderableType] = []
    for verdict in verdicts:
        mark, colour = _MARKS[verdict.outcome]
        text = Text.assemble(
            (f"{mark} {verdict.outcome}  ", f"bold {colour}"),
            (verdict.measured, ""),
            (f"\n\nexpected: {verdict.expected}\nin the paper: {verdict.source}", "dim"),
        )
        parts.append(Panel(text, title=verdict.title, title_align="left", border_style=colour))
    for title, table in verdicts[-1].tables.items() if verdicts else ():
        grid = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2))
        for index, column in enumerate(table.columns):
            grid.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in table.rows:
            grid.add_row(*row)
        parts += [Text(), grid]
    return Group(*parts)
