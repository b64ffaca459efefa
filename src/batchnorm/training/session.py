"""`batchnorm train`: the training of one network in its run folder: records, checkpoints, TensorBoard, report.

records.jsonl               the configuration, then every evaluation, then the result
checkpoints/step-NUMBER.pt  checkpoints to resume from; the newest few are kept
checkpoints/best.pt         the network of the best evaluation, with population statistics and with moving averages
checkpoints/final.pt        the network after the last step, likewise
tensorboard/, report.html   the records as plots
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import nn

from batchnorm.data.source import class_names
from batchnorm.records import Evaluation, RecordFile, Result, Run
from batchnorm.training import checkpoint
from batchnorm.training.checkpoint import CheckpointError, Checkpoints
from batchnorm.training.config import Config
from batchnorm.training.interruption import Interruption
from batchnorm.training.machine import machine, versions
from batchnorm.training.tensorboard import EventFiles
from batchnorm.training.trainer import Check, Trainer

JOB = "network"
_LONGEST_NAME = 300  # of a class, in the records
_AGREE_EVERY_STEPS = 10  # between two all_reduces by which several processes agree on stopping and saving


class Stopped(Exception):
    """The run was stopped by `signal`, after writing a checkpoint."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(by.name)
        self.signal = by


class Diverged(Exception):
    """The loss became inf or nan; the message names the last good checkpoint."""


class Callback(Protocol):
    """Called on the events of a run, in the main process only; the command line shows a progress bar."""

    def on_start(self, trainer: Trainer, source: Path | None, new: list[str]) -> None:
        """Training begins, or resumes from the checkpoint `source`; `new` are not in the file `model.weights`."""

    def on_step(self, trainer: Trainer) -> None:
        """A training step or a batch of an evaluation was computed."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """The network was evaluated."""

    def on_stop_request(self) -> None:
        """The user asked to stop; a checkpoint is being written."""


class Session:
    """The training of one network in `folder`.

    command: the command line, for the run record.
    """

    def __init__(self, config: Config, folder: Path, command: str, callback: Callback) -> None:
        self.config, self.folder, self.command, self.callback = config, folder, command, callback
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoints.keep)
        self._yields = 0

    def run(self) -> Result:
        """Train to the end, from the newest checkpoint if there is one.

        Raises: Stopped after SIGINT or SIGTERM; Diverged; OSError when a file cannot be written; CheckpointError,
            RecordError, DataError, NetworkError for files and settings that cannot be used. In each case the last
            good checkpoint is left as it was.
        """
        with ExitStack() as stack:
            interruption = stack.enter_context(Interruption(lambda _: self.callback.on_stop_request()))
            trainer = Trainer(self.config, JOB)
            source, new = self._newest_checkpoint(), []
            if source is not None and (state := checkpoint.load(source)) is not None:
                try:
                    trainer.load_state_dict(state)
                except CheckpointError as error:
                    raise CheckpointError(f"{source}: {error}") from None
            else:
                new = trainer.load_weights()
            writer = None
            if trainer.accelerator.is_main_process:  # only this one writes records and reports progress
                writer = stack.enter_context(RunWriter(self.folder))
                known: list[Evaluation | Result] = [*trainer.evaluations]
                known += [trainer.result] if trainer.result is not None else []
                writer.write_head(self._run_record(trainer), known)
                self.callback.on_start(trainer, source, new)
            try:
                result = self._train(trainer, interruption, writer)
            except (Stopped, Diverged):
                if writer is not None:
                    writer.write_report()
                raise
            if writer is not None:
                writer.write_report()
        return result

    def _newest_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, as the main process sees it: on other machines a shared folder may lag."""
        newest = [self.checkpoints.newest]
        broadcast_object_list(newest)
        return newest[0]

    def _train(self, trainer: Trainer, interruption: Interruption, writer: RunWriter | None) -> Result:
        best = max((evaluation.accuracy for evaluation in trainer.evaluations), default=-1.0)
        complete = trainer.result is not None
        saved = time.monotonic()
        for record in trainer.run():
            if isinstance(record, Result):
                if not complete:
                    self._finish(trainer, record, writer)
                return record
            if writer is not None:
                self.callback.on_step(trainer)
                writer.write_check(trainer.checked, self.config.training.batch_size)
            if record is not None:
                if writer is not None:
                    writer.write(record)
                    writer.write_norms(trainer.step, trainer.network)
                    self.callback.on_evaluation(record)
                if record.accuracy > best and not trainer.diverged:
                    best = record.accuracy
                    self._save_networks(trainer, "best.pt")
            due = time.monotonic() - saved > self.config.checkpoints.every_seconds
            stop, save = self._agree_on_stop_and_save(trainer, interruption.received or 0, due)
            if stop or save:
                self._save(trainer)
                saved = time.monotonic()
            if stop:
                trainer.accelerator.wait_for_everyone()  # torchrun kills the other processes when one exits
                raise Stopped(signal.Signals(stop))
        raise AssertionError("Trainer.run yields a result last")

    def _finish(self, trainer: Trainer, result: Result, writer: RunWriter | None) -> None:
        if result.diverged:
            self._raise_diverged(result)
        self._save_networks(trainer, "final.pt")
        if writer is not None:
            writer.write(result)
        self._save(trainer)  # last: a resumed run that finds the result in it skips the rest

    def _save(self, trainer: Trainer) -> None:
        state = trainer.state_dict()  # a collective operation: all processes must call it
        if trainer.accelerator.is_main_process and trainer.is_finite:
            self.checkpoints.save(state, trainer.step)

    def _agree_on_stop_and_save(self, trainer: Trainer, stop: int, save: bool) -> tuple[int, bool]:
        """Whether to stop, and by which signal, and whether to save: the same answer in all processes."""
        if trainer.accelerator.num_processes == 1:
            return stop, save
        self._yields += 1
        if self._yields % _AGREE_EVERY_STEPS:
            return 0, False
        flags = torch.tensor([stop, save], dtype=torch.int32, device=trainer.accelerator.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return int(flags[0]), bool(flags[1])

    def _save_networks(self, trainer: Trainer, name: str) -> None:
        """Write the network with population statistics and with moving averages, and the arguments to rebuild it."""
        inference = trainer.inference or trainer.inference_network()
        average = trainer.average_inference
        if average is None and trainer.average is not None:
            average = trainer.inference_network(averaged=True)
        if trainer.accelerator.is_main_process:
            networks = {
                "config": trainer.config.model_dump(mode="json"),
                "classes": trainer.source.classes,
                "class_names": list(class_names(trainer.source)),
                "channels": trainer.source.channels,
                "step": trainer.step,
                "population": inference.state_dict(),
                "moving": trainer.network.state_dict(),
                "average": average.state_dict() if average is not None else None,
            }
            checkpoint.save(networks, self.checkpoints.folder / name)

    def _raise_diverged(self, result: Result) -> None:
        newest = self.checkpoints.newest
        last_good = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        raise Diverged(
            f"the loss became {result.loss} by step {result.steps:,}: start a new run with a lower optimizer.rate; "
            f"{last_good}"
        )

    def _run_record(self, trainer: Trainer) -> Run:
        config, source = self.config, trainer.source
        return Run(
            experiment="train",
            title=f"{config.model.name} on {config.data.source}",
            command=self.command,
            config=config.model_dump(mode="json"),
            seeds=[config.training.seed],
            versions=versions(),
            machine=machine(),
            data=f"{config.data.source}: {len(source):,} training and {len(trainer.validation_source):,} validation "
            f"images in {source.classes} classes",
            classes=[name[:_LONGEST_NAME] for name in class_names(source)],
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )


class RunWriter:
    """Writes records.jsonl, TensorBoard events and the report, in the main process; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._records = stack.enter_context(RecordFile(self._folder / "records.jsonl"))
            self._events = stack.enter_context(EventFiles(self._folder / "tensorboard"))
            self._check: Check | None = None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write_head(self, head: Run, known: Sequence[Evaluation | Result]) -> None:
        """Write the run record if the file is new or its run becomes longer, and `known` records that it lacks."""
        runs = [record for record in self._records.records if isinstance(record, Run)]
        if not runs or _steps(runs[-1]) != _steps(head):
            self._records.append(head)
        for record in known:
            self.write(record)

    def write_check(self, check: Check | None, batch_size: int) -> None:
        """Write what the training loss was, unless it is written already, to TensorBoard."""
        before, self._check = self._check, check
        if check is None or check == before:
            return
        values = {"training/loss": check.recent, "training/learning rate": check.rate}
        if before is not None and check.seconds > before.seconds:
            images = (check.step - before.step) * batch_size
            values["training/images per second"] = images / (check.seconds - before.seconds)
        self._events.add_values(JOB, check.step, values)

    def write_norms(self, step: int, network: nn.Module) -> None:
        """Write γ, β and the running statistics of the BN layers as histograms, to TensorBoard."""
        self._events.add_norms(JOB, step, network)

    def write_report(self) -> None:
        """Write report.html from the records so far."""
        from batchnorm import report  # imports matplotlib, which takes a while

        report.build(self._folder)

    def write(self, record: Evaluation | Result) -> None:
        """Write a record, unless the file has it already, as in a resumed run."""
        if self._records.append(record) and isinstance(record, Evaluation):
            self._events.add(record)


def _steps(run: Run) -> object:
    """The steps that a run was to have."""
    training = run.config.get("training")
    return training.get("steps") if isinstance(training, dict) else None
