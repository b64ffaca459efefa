"""The terminal output of `batchnorm bench`: a progress bar with the current case."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from batchnorm.bench.rows import Command, Row


class Display:
    """A progress bar on `console`; without a terminal, a line for each finished case."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.fields[command]}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar: TaskID | None = None
        self._case = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def on_start(self, command: Command, cases: int) -> None:
        """Start the bar of `command`."""
        if self._bar is not None:
            self._bars.remove_task(self._bar)
        self._bar = self._bars.add_task("", total=cases, command=command)

    def on_case(self, case: str) -> None:
        """Show the name of the case."""
        assert self._bar is not None
        self._case = case
        self._bars.update(self._bar, description=case)

    def on_rows(self, rows: list[Row]) -> None:
        """Advance the bar."""
        assert self._bar is not None
        self._bars.advance(self._bar)
        if not self._console.is_terminal:
            candidate = next(
                candidate for candidate in ("plain", "one batch", "torch") if candidate in rows[0].times
            )
            ratios = ", ".join(f"{row.times[candidate].over_ours:.2f}× {row.part}" for row in rows)
            self._console.print(
                f"{self._case}  {candidate}/ours {ratios}", markup=False, highlight=False, soft_wrap=True
            )
