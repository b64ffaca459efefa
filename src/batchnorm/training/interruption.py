"""Graceful shutdown: the first SIGINT or SIGTERM is a request to stop, the second raises KeyboardInterrupt.

Under torchrun one request may arrive twice: from a scheduler that signals every process of a job, and from torchrun,
which forwards the signal that it received.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType


class Interruption:
    """A context manager: the first SIGINT or SIGTERM in it is stored in `received`, the second raises.

    on_signal: called with the first signal.
    """

    _DUPLICATE_SECONDS = 1.0  # another signal within this time is the same request

    def __init__(self, on_signal: Callable[[signal.Signals], None]) -> None:
        self.received: signal.Signals | None = None
        self._on_signal = on_signal
        self._received_at = 0.0

    def __enter__(self) -> Interruption:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._received_at < self._DUPLICATE_SECONDS:
                return
            raise KeyboardInterrupt
        self.received, self._received_at = signal.Signals(number), time.monotonic()
        self._on_signal(self.received)
