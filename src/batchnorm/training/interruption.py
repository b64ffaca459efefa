"""Ctrl-C and SIGTERM as a polite request; a second one is as rude as ever."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class Interruption:
    """A context manager: the first SIGINT or SIGTERM in it is noted and told, the second raises KeyboardInterrupt.

    told: called with the signal, once.
    """

    def __init__(self, told: Callable[[signal.Signals], None]) -> None:
        self.seen: signal.Signals | None = None
        self._told = told

    def __enter__(self) -> Interruption:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.seen is not None:
            raise KeyboardInterrupt
        self.seen = signal.Signals(number)
        self._told(self.seen)
