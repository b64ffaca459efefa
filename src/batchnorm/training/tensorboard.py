"""Evaluations as TensorBoard events, one folder per network."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from batchnorm.records import Evaluation
from batchnorm.requirements import install_command

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class EventFiles:
    """Event files below `folder`, a context manager; without the tensorboard package it writes nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, SummaryWriter] = {}
        self._warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()

    def add(self, evaluation: Evaluation) -> None:
        """Write one evaluation."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if not self._warned:
                warnings.warn(f"no TensorBoard events: {install_command('train')}", stacklevel=2)
            self._warned = True
            return
        if evaluation.job not in self._writers:
            self._writers[evaluation.job] = SummaryWriter(str(self._folder / evaluation.job))
        writer = self._writers[evaluation.job]
        writer.add_scalar("loss/train", evaluation.loss, evaluation.step)
        writer.add_scalar("accuracy/test", evaluation.accuracy, evaluation.step)
        if evaluation.accuracy_moving is not None:
            writer.add_scalar("accuracy/test by moving averages", evaluation.accuracy_moving, evaluation.step)
        if evaluation.accuracy_average is not None:
            writer.add_scalar(
                "accuracy/test of averaged weights", evaluation.accuracy_average, evaluation.step
            )
        if evaluation.accuracy_top5 is not None:
            writer.add_scalar("accuracy/test among five", evaluation.accuracy_top5, evaluation.step)
        for name, value in zip(("15th", "50th", "85th"), evaluation.percentiles or (), strict=False):
            writer.add_scalar(f"sigmoid input/{name} percentile", value, evaluation.step)
        writer.flush()  # so that a killed run loses nothing
