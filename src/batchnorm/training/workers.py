"""A pool of training processes, one per core. Each job can be stopped at any step and resumes from its checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from threading import Timer
from typing import Any, Generic, Protocol, Self, TypeVar

import torch

from batchnorm.children import STOP_SIGNALS, exit_with_parent, signals_blocked
from batchnorm.memory import keep_memory
from batchnorm.records import Evaluation, Result
from batchnorm.training import checkpoint

_CHECKPOINT_SECONDS = 10.0
TERMINATION_GRACE_SECONDS = 10.0


class WorkerDied(Exception):
    """A worker process ended unexpectedly: killed, or out of memory."""


@dataclass(frozen=True)
class Progress:
    """The current step of the network `job`, and its `evaluation` if it was just evaluated."""

    job: str
    step: int
    evaluation: Evaluation | None = None


@dataclass(frozen=True)
class Outcome:
    """All records of the network `job`; `finished` is False if it was stopped before its end."""

    job: str
    records: list[Evaluation | Result]
    finished: bool


class Trainable(Protocol):
    """A job in a worker. It can be stopped after any yield; another instance resumes from its state_dict."""

    job: str
    evaluations: list[Evaluation]

    @property
    def step(self) -> int:
        """Steps taken so far."""

    def run(self) -> Iterator[Evaluation | Result | None]:
        """Run; yield each record, the result last, and None wherever the job may be stopped."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from this state."""


J_contra = TypeVar("J_contra", contravariant=True)
J = TypeVar("J")


class TrainerFactory(Protocol[J_contra]):
    """Creates the trainer of a job from its configuration, its name and the folder of all checkpoints; picklable."""

    def __call__(self, config: J_contra, job: str, folder: Path, /) -> Trainable:
        """Create the trainer."""


class Workers(Generic[J]):
    """A pool of processes that train networks; a context manager.

    make_trainer: creates the trainer of a job, in the worker process.
    checkpoints: the folder with one checkpoint per network.
    count: number of processes; by default one per core.
    """

    def __init__(self, make_trainer: TrainerFactory[J], checkpoints: Path, count: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # torch does not survive a fork with its threads
        self.count = count or available_cores()
        self._checkpoints, self._stopping = checkpoints, False
        self._stop, self._messages = context.Event(), context.Queue()
        self._pool = ProcessPoolExecutor(
            self.count, context, _initialize, (make_trainer, self._messages, self._stop)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._pool.shutdown(cancel_futures=True)

    def stop(self) -> None:
        """Ask every network in training to save its checkpoint and stop; returns immediately."""
        if not self._stopping:  # Event.set is not reentrant: a signal handler must not call it again
            self._stopping = True
            self._stop.set()

    def train(self, jobs: Mapping[str, J]) -> Iterator[Progress | Outcome]:
        """Train `jobs`, by name; yield progress as it arrives and one outcome per job, until all have ended.

        A network that has a checkpoint resumes from it.

        Raises: WorkerDied when a process was killed; any exception that a worker raised.
        """
        with signals_blocked():  # a process inherits the mask, so Ctrl-C does not kill it during startup
            pending: set[Future[Outcome]] = {
                self._pool.submit(_train, name, config, self.checkpoint(name))
                for name, config in jobs.items()
            }
        while pending:
            yield from self._receive_progress()
            for future in [future for future in pending if future.done()]:
                pending.remove(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    raise WorkerDied("a training process was killed, or ran out of memory") from None

    def checkpoint(self, job: str) -> Path:
        """The path of a job's checkpoint."""
        return self._checkpoints / f"{job}.pt"

    def _receive_progress(self) -> Iterator[Progress]:
        """The messages in the queue, after waiting up to 0.1 s for the first."""
        try:
            yield self._messages.get(timeout=0.1)
            while True:
                yield self._messages.get_nowait()
        except queue.Empty:
            return


def available_cores() -> int:
    """The cores this process may run on, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _WorkerState:
    """The global state of a worker process."""

    make_trainer: TrainerFactory[Any]
    messages: multiprocessing.Queue[Progress]
    stop: Event
    training = False
    terminated = False


def _initialize(make_trainer: TrainerFactory[Any], messages: Any, stop: Event) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole process group; the parent handles it
    signal.signal(signal.SIGTERM, _on_sigterm)
    exit_with_parent()  # safe at any moment: checkpoints are written atomically
    keep_memory()
    torch.set_num_threads(1)  # the networks are small; and results do not depend on the number of cores
    _WorkerState.make_trainer, _WorkerState.messages, _WorkerState.stop = make_trainer, messages, stop
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _on_sigterm(*_: object) -> None:
    """Exit immediately if idle, else once the checkpoint is written, at the latest after the grace period."""
    if not _WorkerState.training:
        os._exit(0)
    _WorkerState.terminated = True
    timer = Timer(TERMINATION_GRACE_SECONDS, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _train(job: str, config: Any, path: Path) -> Outcome:
    _WorkerState.training = True
    try:
        trainer = _WorkerState.make_trainer(config, job, path.parent)
        state = checkpoint.load(path)
        if state is not None:
            trainer.load_state_dict(state)
        if _WorkerState.stop.is_set():
            return Outcome(job, list(trainer.evaluations), finished=False)
        return _run(trainer, path)
    finally:
        _WorkerState.training = False


def _run(trainer: Trainable, path: Path) -> Outcome:
    last_checkpoint = last_message = time.monotonic()
    for record in trainer.run():
        if isinstance(record, Result):
            checkpoint.save(trainer.state_dict(), path)
            return Outcome(trainer.job, [*trainer.evaluations, record], finished=True)
        now = time.monotonic()
        if record is not None or now - last_message > 0.2:
            _WorkerState.messages.put(Progress(trainer.job, trainer.step, record))
            last_message = now
        if _WorkerState.stop.is_set() or _WorkerState.terminated:
            break
        if now - last_checkpoint > _CHECKPOINT_SECONDS:
            checkpoint.save(trainer.state_dict(), path)
            last_checkpoint = now
    checkpoint.save(trainer.state_dict(), path)
    return Outcome(trainer.job, list(trainer.evaluations), finished=False)
