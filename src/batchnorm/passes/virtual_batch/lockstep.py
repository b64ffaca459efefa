"""Threads in lockstep: one runs at a time, in a fixed order, so that what they do is the same every time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

P = TypeVar("P")
R = TypeVar("R")


class _Stopped(BaseException):
    """Another thread failed."""


class Lockstep:
    """Threads that take turns, and wait for each other wherever they meet."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._turn = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._at: list[tuple[object, Any] | None] = [None] * count
        self._found: Sequence[Any] = ()
        self._own = threading.local()
        self._left = count
        self._over = threading.Event()

    def place(self) -> int:
        """Which of the threads this is."""
        place: int = self._own.place
        return place

    def run(self, tasks: list[Callable[[], None]]) -> None:
        """Run each task in a thread; raise what the first that failed raised."""
        threads = [
            threading.Thread(target=self._run, args=each, daemon=True, name=f"in lockstep, {each[0]}")
            for each in enumerate(tasks)
        ]
        try:
            for thread in threads:
                thread.start()
            # Ctrl-C is lost to a wait without end that it comes just before, and makes a thread that is joined look
            # as if it had stopped (until Python 3.13)
            while not self._over.wait(0.1):
                pass
        except BaseException as error:  # nobody shall wait for a turn that does not come
            self._stop(error)
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.01)
            raise
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, place: int, task: Callable[[], None]) -> None:
        self._own.place = place
        try:
            self._wait_for_turn(place)
            task()
            if any(self._at):
                raise _apart()
            self._pass_on(place)
        except _Stopped:
            pass
        except BaseException as error:
            self._stop(error)
        finally:
            with self._changed:
                self._left -= 1
            if not self._left:
                self._over.set()

    def meet(self, where: object, part: P, join: Callable[[list[P]], Sequence[R]]) -> R:
        """What `join` makes of this thread's `part`, once all threads have come to `where` with theirs."""
        place = self.place()
        if any(at is not None and at[0] is not where for at in self._at):
            raise _apart()
        self._at[place] = (where, part)
        if place == self._count - 1:
            parts = [at[1] for at in self._at if at is not None]
            if len(parts) < self._count:
                raise _apart()
            self._found = join(parts)
            self._at = [None] * self._count
        self._pass_on(place)
        self._wait_for_turn(place)
        found: R = self._found[place]
        return found

    def _pass_on(self, place: int) -> None:
        with self._changed:
            self._turn = (place + 1) % self._count
            self._changed.notify_all()

    def _wait_for_turn(self, place: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == place or self._error is not None)
            if self._error is not None:
                raise _Stopped

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


def _apart() -> RuntimeError:
    return RuntimeError(
        "the micro-batches of a virtual batch took different ways through the model: "
        "its layers must be called in the same order for each"
    )
