"""`batchnorm train`: one network in a folder of its own, from run.toml to records, checkpoints and a page.

records.jsonl               the configuration, then every evaluation, then the result
checkpoints/step-NUMBER.pt  what a stopped run continues from; the newest few
checkpoints/best.pt         the network of the best evaluation, by population statistics and by moving averages
checkpoints/final.pt        the same of the end
tensorboard/, report.html   the same for the eye
"""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list

from batchnorm.records import Evaluation, RecordFile, Result, Run
from batchnorm.training import checkpoint
from batchnorm.training.checkpoint import CheckpointError, Checkpoints
from batchnorm.training.config import Config
from batchnorm.training.interruption import Interruption
from batchnorm.training.machine import machine, versions
from batchnorm.training.tensorboard import EventFiles
from batchnorm.training.trainer import Trainer

JOB = "network"
_AGREE_EVERY = 10  # yields between two moments at which several processes ask each other whether to stop


class Stopped(Exception):
    """The run was asked to stop; a checkpoint was written. `signal` says by what."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(by.name)
        self.signal = by


class Diverged(Exception):
    """The loss is no number any more; the message names the last good checkpoint."""


class Watcher(Protocol):
    """Who is told how the run goes, in the first process only; the command line shows a progress bar."""

    def started(self, trainer: Trainer, source: Path | None) -> None:
        """Training begins, or goes on from the checkpoint `source`."""

    def step(self, trainer: Trainer) -> None:
        """A step was made, or a part of an evaluation."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """The network was evaluated."""

    def stopping(self) -> None:
        """The user asked to stop; a checkpoint is being written."""


class Session:
    """The training of one network in `folder`.

    command: the command line, for the record.
    """

    def __init__(self, config: Config, folder: Path, command: str, watcher: Watcher) -> None:
        self.config, self.folder, self.command, self.watcher = config, folder, command, watcher
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoints.keep)
        self._asked = 0

    def run(self) -> Result:
        """Train, from the newest checkpoint if there is one, to the end.

        Raises: Stopped after SIGINT or SIGTERM; Diverged; OSError when something cannot be written; CheckpointError,
            RecordError, DataError, NetworkError for what is there and cannot be used. In each case the last good
            checkpoint is left as it was.
        """
        with ExitStack() as stack:
            interruption = stack.enter_context(Interruption(lambda _: self.watcher.stopping()))
            trainer = Trainer(self.config, JOB)
            source = self._newest()
            if source is not None and (state := checkpoint.load(source)) is not None:
                try:
                    trainer.load_state_dict(state)
                except CheckpointError as error:
                    raise CheckpointError(f"{source}: {error}") from None
            paper = None
            if trainer.processes.is_main_process:  # the others train along and say nothing
                paper = stack.enter_context(_Paper(self.folder))
                paper.begin(self._head(trainer), trainer.evaluations)
                self.watcher.started(trainer, source)
            try:
                result = self._train(trainer, interruption, paper)
            except (Stopped, Diverged):
                if paper is not None:
                    paper.draw()
                raise
            if paper is not None:
                paper.draw()
        return result

    def _newest(self) -> Path | None:
        """The checkpoint to go on from: what the first process sees, for a shared folder may lag behind elsewhere."""
        seen = [self.checkpoints.newest]
        broadcast_object_list(seen)
        return seen[0]

    def _train(self, trainer: Trainer, interruption: Interruption, paper: _Paper | None) -> Result:
        best = max((evaluation.accuracy for evaluation in trainer.evaluations), default=-1.0)
        complete = trainer.result is not None
        saved = time.monotonic()
        for record in trainer.run():
            if isinstance(record, Result):
                if not complete:
                    self._finish(trainer, record, paper)
                return record
            if paper is not None:
                self.watcher.step(trainer)
            if record is not None:
                if paper is not None:
                    paper.write(record)
                    self.watcher.evaluated(record)
                if record.accuracy > best and not trainer.diverged:
                    best = record.accuracy
                    self._save_networks(trainer, "best.pt")
            due = time.monotonic() - saved > self.config.checkpoints.every_seconds
            stop, save = self._agreed(trainer, interruption.seen or 0, due)
            if stop or save:
                self._save(trainer)
                saved = time.monotonic()
            if stop:
                trainer.processes.wait_for_everyone()  # torchrun ends the others when the first leaves
                raise Stopped(signal.Signals(stop))
        raise AssertionError("a trainer ends with a result")

    def _finish(self, trainer: Trainer, result: Result, paper: _Paper | None) -> None:
        if result.diverged:
            self._say_diverged(result)
        self._save_networks(trainer, "final.pt")
        if paper is not None:
            paper.write(result)
        self._save(trainer)  # last: whoever finds the result in it will do none of this again

    def _save(self, trainer: Trainer) -> None:
        state = trainer.state_dict()  # of all processes, so all must ask for it
        if trainer.processes.is_main_process and trainer.sound:
            self.checkpoints.save(state, trainer.step)

    def _agreed(self, trainer: Trainer, stop: int, save: bool) -> tuple[int, bool]:
        """What one process wants all must do at the same moment: stop by a signal, save."""
        if trainer.processes.num_processes == 1:
            return stop, save
        self._asked += 1
        if self._asked % _AGREE_EVERY:
            return 0, False
        wanted = torch.tensor([stop, save], dtype=torch.int32, device=trainer.processes.device)
        dist.all_reduce(wanted, dist.ReduceOp.MAX)
        return int(wanted[0]), bool(wanted[1])

    def _save_networks(self, trainer: Trainer, name: str) -> None:
        """The network as it is used and as it was trained, and what is needed to build it again."""
        inference = trainer.inference or trainer.inference_network()
        average = trainer.average_inference
        if average is None and trainer.average is not None:
            average = trainer.inference_network(averaged=True)
        if trainer.processes.is_main_process:
            networks = {
                "config": trainer.config.model_dump(mode="json"),
                "classes": trainer.source.classes,
                "channels": trainer.source.channels,
                "step": trainer.step,
                "population": inference.state_dict(),
                "moving": trainer.network.state_dict(),
                "average": average.state_dict() if average is not None else None,
            }
            checkpoint.save(networks, self.checkpoints.folder / name)

    def _say_diverged(self, result: Result) -> None:
        newest = self.checkpoints.newest
        good = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        raise Diverged(
            f"the loss became {result.loss} by step {result.steps:,}: start a new run with a lower optimizer.rate; "
            f"{good}"
        )

    def _head(self, trainer: Trainer) -> Run:
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
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )


class _Paper:
    """Where the first process writes down what happens, a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._records = stack.enter_context(RecordFile(self._folder / "records.jsonl"))
            self._events = stack.enter_context(EventFiles(self._folder / "tensorboard"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def begin(self, head: Run, evaluations: list[Evaluation]) -> None:
        """Write the head of a new record file, and what a checkpoint knows that a lost file does not."""
        if not self._records.records:
            self._records.append(head)
        for evaluation in evaluations:
            self.write(evaluation)

    def draw(self) -> None:
        """Make the page of what there is."""
        from batchnorm import report  # and matplotlib, for which training need not wait

        report.build(self._folder)

    def write(self, record: Evaluation | Result) -> None:
        """Write a record, unless a run that was continued has written it before."""
        if self._records.append(record) and isinstance(record, Evaluation):
            self._events.add(record)
