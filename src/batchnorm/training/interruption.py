"""Ctrl-C and SIGTERM as a polite request; a second one is as rude as ever.

Under torchrun one request may come twice: from a scheduler that tells every process of a job, and from torchrun, which
passes on what it was told.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType


class Interruption:
    """A context manager: the first SIGINT or SIGTERM in it is noted and told, the second raises KeyboardInterrupt.

    told: called with the signal, once.
    """

    _ECHO = 1.0  # seconds in which another signal is the same request

    def __init__(self, told: Callable[[signal.Signals], None]) -> None:
        self.seen: signal.Signals | None = None
        self._told = told
        self._at = 0.0

    def __enter__(self) -> Interruption:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.seen is not None:
            if time.monotonic() - self._at < self._ECHO:
                return
            raise KeyboardInterrupt
        self.seen, self._at = signal.Signals(number), time.monotonic()
        self._told(self.seen)
