"""The terminal output of `batchnorm train`: a progress bar with images/s and remaining time, a line per evaluation."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from batchnorm.data.corrupt import Corrupt
from batchnorm.records import Evaluation
from batchnorm.training.trainer import Trainer

_REFRESH = 0.2  # seconds
_SPEED_WINDOW = 10.0  # seconds over which images/s is averaged


class Bar:
    """A progress bar on `console`, a context manager; without a terminal it prints only the lines of evaluations."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[speed]}", justify="right"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._refreshed_at = 0.0
        self._speed_samples: list[tuple[float, int]] = []  # (seconds in training, step)
        self._reported: dict[Corrupt, int] = {}  # the number of unreadable images reported so far
        self.best: Evaluation | None = None  # of all evaluations, the first with the best accuracy

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_start(self, trainer: Trainer, source: Path | None, new: list[str]) -> None:
        """Print the model, the data and where it starts from, and add the bar."""
        config = trainer.config
        for evaluation in trainer.evaluations:
            self._keep_best(evaluation)
        parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
        processes = trainer.accelerator
        self._print(
            f"{config.model.name}, {parameters:,} parameters, on {len(trainer.source):,} images of "
            f"{config.data.source}; {processes.num_processes} process{'es' * (processes.num_processes > 1)} "
            f"on {processes.device}{_threads(trainer)}"
        )
        if source is not None:
            self._print(f"resuming from {source}")
        elif config.model.weights is not None:
            self._print(f"starting from {config.model.weights}")
        for name in new:
            self._print(f"with new weights: {name}")
        self._task = self._bar.add_task("", total=config.training.steps, completed=trainer.step, speed="")

    def on_step(self, trainer: Trainer) -> None:
        """Move the bar."""
        self._name_corrupt(trainer)
        now = time.monotonic()
        if now - self._refreshed_at < _REFRESH:
            return
        self._refreshed_at = now
        self._speed_samples = [
            sample for sample in self._speed_samples if trainer.seconds - sample[0] < _SPEED_WINDOW
        ]
        self._speed_samples.append((trainer.seconds, trainer.step))
        seconds, steps = (
            last - first for first, last in zip(self._speed_samples[0], self._speed_samples[-1], strict=True)
        )
        speed = steps * trainer.config.training.batch_size / seconds if seconds else 0.0
        self._bar.update(
            self._task,
            completed=trainer.step,
            description=f"step {trainer.step:,} of {trainer.config.training.steps:,}",
            speed=f"{speed:,.0f} images/s" if speed else "",
        )

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Print a line."""
        self._keep_best(evaluation)
        extra = "".join(
            f"  {name} {value:.2%}"
            for name, value in (
                ("among five", evaluation.accuracy_top5),
                ("averaged weights", evaluation.accuracy_average),
            )
            if value is not None
        )
        self._print(
            f"step {evaluation.step:>9,}  training loss {evaluation.loss:.4f}  "
            f"accuracy {evaluation.accuracy:.2%}{extra}"
        )

    def on_stop_request(self) -> None:
        """Confirm Ctrl-C."""
        self._print("stopping: writing a checkpoint (Ctrl-C again to quit without it)")

    def _keep_best(self, evaluation: Evaluation) -> None:
        better = self.best is None or evaluation.accuracy > self.best.accuracy
        if better and math.isfinite(evaluation.loss):  # of a network that diverged nothing is kept
            self.best = evaluation

    def _name_corrupt(self, trainer: Trainer) -> None:
        for corrupt in trainer.corrupt.values():
            if len(corrupt) > (reported := self._reported.get(corrupt, 0)):
                for name, why in list(corrupt.found.items())[reported:]:
                    self._print(f"skipped an image that cannot be read, {name}: {why}")
                self._reported[corrupt] = len(corrupt)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _threads(trainer: Trainer) -> str:
    """With how many threads a CPU computes."""
    if trainer.accelerator.device.type != "cpu":
        return ""
    threads = torch.get_num_threads()
    return f", {threads} thread{'s' * (threads > 1)}"
