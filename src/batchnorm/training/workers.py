"""Many training runs side by side, one process a core, each stoppable at any step and continued from its checkpoint."""

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

from batchnorm.children import STOP_SIGNALS, leave_with_parent, signals_blocked
from batchnorm.memory import keep_memory
from batchnorm.records import Evaluation, Result
from batchnorm.training import checkpoint

_CHECKPOINT_SECONDS = 10.0
_LAST_WORDS_SECONDS = 10.0


class WorkerDied(Exception):
    """A worker process ended without a word: killed, or out of memory."""


@dataclass(frozen=True)
class Progress:
    """How far the network `job` has come; `evaluation` when it was just evaluated."""

    job: str
    step: int
    evaluation: Evaluation | None = None


@dataclass(frozen=True)
class Outcome:
    """All that the network `job` has to record; `finished` unless it was stopped on the way."""

    job: str
    records: list[Evaluation | Result]
    finished: bool


class Trains(Protocol):
    """What a worker runs: it can stop after any yield, and another one that is given its state goes on."""

    job: str
    evaluations: list[Evaluation]

    @property
    def step(self) -> int:
        """How far it is."""

    def run(self) -> Iterator[Evaluation | Result | None]:
        """Do it; yield what is worth recording, the result last, and None at moments that are good to stop at."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


J_contra = TypeVar("J_contra", contravariant=True)
J = TypeVar("J")


class Make(Protocol[J_contra]):
    """From a configuration, a name and the folder of all checkpoints to what a worker runs; can be pickled."""

    def __call__(self, config: J_contra, job: str, folder: Path, /) -> Trains:
        """Make it."""


class Workers(Generic[J]):
    """A pool of processes that train networks; a context manager.

    make: what a process makes of a configuration.
    checkpoints: the folder that holds one file a network.
    count: number of processes; by default one a core.
    """

    def __init__(self, make: Make[J], checkpoints: Path, count: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # torch does not survive a fork with its threads
        self.count = count or available_cores()
        self._checkpoints, self._stopping = checkpoints, False
        self._stop, self._messages = context.Event(), context.Queue()
        self._pool = ProcessPoolExecutor(self.count, context, _start, (make, self._messages, self._stop))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._pool.shutdown(cancel_futures=True)

    def stop(self) -> None:
        """Ask every network in training to save its checkpoint and stop; returns at once."""
        if not self._stopping:  # an event may not be set again by a signal that arrives while it is being set
            self._stopping = True
            self._stop.set()

    def train(self, jobs: Mapping[str, J]) -> Iterator[Progress | Outcome]:
        """Train `jobs`, by name; yield their progress as it comes and an outcome each, until all have ended.

        A network that has a checkpoint continues from it.

        Raises: WorkerDied when a process was killed; whatever a worker raised.
        """
        with signals_blocked():  # a process inherits the mask: none dies of Ctrl-C while it is starting
            pending: set[Future[Outcome]] = {
                self._pool.submit(_train, name, config, self.checkpoint(name))
                for name, config in jobs.items()
            }
        while pending:
            yield from self._progress()
            for future in [future for future in pending if future.done()]:
                pending.remove(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    raise WorkerDied("a training process was killed, or ran out of memory") from None

    def checkpoint(self, job: str) -> Path:
        """Where the state of a job is."""
        return self._checkpoints / f"{job}.pt"

    def _progress(self) -> Iterator[Progress]:
        """What has arrived, after waiting for it a moment."""
        try:
            yield self._messages.get(timeout=0.1)
            while True:
                yield self._messages.get_nowait()
        except queue.Empty:
            return


def available_cores() -> int:
    """The cores this process may run on, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Here:
    """What a worker process was started with, and whether it was told to go."""

    make: Make[Any]
    messages: multiprocessing.Queue[Progress]
    stop: Event
    training = False
    terminated = False


def _start(make: Make[Any], messages: Any, stop: Event) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, _terminate)
    leave_with_parent()  # a checkpoint is whole at any moment
    keep_memory()
    torch.set_num_threads(1)  # the networks are small: a core each, and sums that never depend on the machine
    _Here.make, _Here.messages, _Here.stop = make, messages, stop
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _terminate(*_: object) -> None:
    """On SIGTERM: go at once if idle, else after the checkpoint; the parent may be stopping politely too."""
    if not _Here.training:
        os._exit(0)
    _Here.terminated = True
    timer = Timer(_LAST_WORDS_SECONDS, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _train(job: str, config: Any, path: Path) -> Outcome:
    _Here.training = True
    try:
        trainer = _Here.make(config, job, path.parent)
        state = checkpoint.load(path)
        if state is not None:
            trainer.load_state_dict(state)
        if _Here.stop.is_set():
            return Outcome(job, list(trainer.evaluations), finished=False)
        return _run(trainer, path)
    finally:
        _Here.training = False


def _run(trainer: Trains, path: Path) -> Outcome:
    saved = told = time.monotonic()
    for record in trainer.run():
        if isinstance(record, Result):
            checkpoint.save(trainer.state_dict(), path)
            return Outcome(trainer.job, [*trainer.evaluations, record], finished=True)
        now = time.monotonic()
        if record is not None or now - told > 0.2:
            _Here.messages.put(Progress(trainer.job, trainer.step, record))
            told = now
        if _Here.stop.is_set() or _Here.terminated:
            break
        if now - saved > _CHECKPOINT_SECONDS:
            checkpoint.save(trainer.state_dict(), path)
            saved = now
    checkpoint.save(trainer.state_dict(), path)
    return Outcome(trainer.job, list(trainer.evaluations), finished=False)
