"""Threads in lockstep: one runs at a time, in a fixed order, which makes the result deterministic."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

P = TypeVar("P")
R = TypeVar("R")


class _Stopped(BaseException):
    """Raised in a thread when another one failed."""


class Lockstep:
    """Threads that run in turn and wait for each other at each `gather`."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._turn = 0
        self._turn_changed = threading.Condition()
        self._error: BaseException | None = None
        self._arrivals: list[tuple[object, Any] | None] = [None] * count
        self._results: Sequence[Any] = ()
        self._local = threading.local()
        self._active = count
        self._finished = threading.Event()

    def index(self) -> int:
        """The index of the current thread."""
        index: int = self._local.index
        return index

    def run(self, tasks: list[Callable[[], None]]) -> None:
        """Run each task in its own thread; raise the exception of the first that failed."""
        threads = [
            threading.Thread(target=self._run, args=each, daemon=True, name=f"in lockstep, {each[0]}")
            for each in enumerate(tasks)
        ]
        try:
            for thread in threads:
                thread.start()
            # wait with a timeout: a Ctrl-C just before a wait without timeout would be lost; and not Thread.join, after
            # whose interruption a running thread counts as stopped (until Python 3.13)
            while not self._finished.wait(0.1):
                pass
        except BaseException as error:  # release the threads that wait for their turn
            self._stop(error)
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.01)
            raise
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, index: int, task: Callable[[], None]) -> None:
        self._local.index = index
        try:
            self._wait_for_turn(index)
            task()
            if any(self._arrivals):
                raise _different_paths()
            self._end_turn(index)
        except _Stopped:
            pass
        except BaseException as error:
            self._stop(error)
        finally:
            with self._turn_changed:
                self._active -= 1
            if not self._active:
                self._finished.set()

    def gather(self, where: object, part: P, join: Callable[[list[P]], Sequence[R]]) -> R:
        """Wait for all threads to call it with the same `where`; return this thread's result of `join` on all parts."""
        index = self.index()
        if any(arrival is not None and arrival[0] is not where for arrival in self._arrivals):
            raise _different_paths()
        self._arrivals[index] = (where, part)
        if index == self._count - 1:
            parts = [arrival[1] for arrival in self._arrivals if arrival is not None]
            if len(parts) < self._count:
                raise _different_paths()
            self._results = join(parts)
            self._arrivals = [None] * self._count
        self._end_turn(index)
        self._wait_for_turn(index)
        result: R = self._results[index]
        return result

    def _end_turn(self, index: int) -> None:
        with self._turn_changed:
            self._turn = (index + 1) % self._count
            self._turn_changed.notify_all()

    def _wait_for_turn(self, index: int) -> None:
        with self._turn_changed:
            self._turn_changed.wait_for(lambda: self._turn == index or self._error is not None)
            if self._error is not None:
                raise _Stopped

    def _stop(self, error: BaseException) -> None:
        with self._turn_changed:
            self._error = self._error or error
            self._turn_changed.notify_all()


def _different_paths() -> RuntimeError:
    return RuntimeError(
        "the micro-batches of a virtual batch took different paths through the model: "
        "its layers must be called in the same order for each"
    )
