"""Evaluations, losses and BN layers as TensorBoard events, one folder per network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from torch import nn

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
        values = {
            "loss/train": evaluation.loss,
            "loss/validation": evaluation.loss_validation,
            "accuracy/test": evaluation.accuracy,
            "accuracy/test by moving averages": evaluation.accuracy_moving,
            "accuracy/test of averaged weights": evaluation.accuracy_average,
            "accuracy/test among five": evaluation.accuracy_top5,
        }
        for name, value in zip(("15th", "50th", "85th"), evaluation.percentiles or (), strict=False):
            values[f"sigmoid input/{name} percentile"] = value
        self.add_values(evaluation.job, evaluation.step, values)

    def add_values(self, job: str, step: int, values: Mapping[str, float | None]) -> None:
        """Write numbers of a network after `step` steps, by tag; those that are None are left out."""
        writer = self._writer(job)
        if writer is not None:
            for tag, value in values.items():
                if value is not None:
                    writer.add_scalar(tag, value, step)
            writer.flush()  # so that a killed run loses nothing

    def add_norms(self, job: str, step: int, network: nn.Module) -> None:
        """Write γ, β and the running statistics of each BN layer as histograms over its channels."""
        writer = self._writer(job)
        if writer is None:
            return
        for name, layer in network.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                shown = {
                    "γ": layer.weight,
                    "β": layer.bias,
                    "running mean": layer.running_mean,
                    "running variance": layer.running_var,
                }
                for what, values in shown.items():
                    if values is not None and bool(values.isfinite().all()):
                        writer.add_histogram(f"bn {what}/{name}", values.detach().float().cpu().numpy(), step)

    def _writer(self, job: str) -> SummaryWriter | None:
        """The writer of a network; None, with one warning, where TensorBoard is not installed."""
        if job in self._writers:
            return self._writers[job]
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if not self._warned:
                warnings.warn(f"no TensorBoard events: {install_command('train')}", stacklevel=2)
            self._warned = True
            return None
        self._writers[job] = SummaryWriter(str(self._folder / job))
        return self._writers[job]
