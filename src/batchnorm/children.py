"""Child processes: they ignore a Ctrl-C that the parent handles, and they end with the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from threading import Thread

# Ctrl-C, and often SIGTERM, reach the whole process group; the parent handles them.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_blocked(*signals: signal.Signals) -> Iterator[None]:
    """Block `signals`, by default both, in processes started within the block, which inherit the mask."""
    resource_tracker.ensure_running()  # starting it with the first process would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals or STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_with_parent() -> None:
    """In a child: exit as soon as the parent has ended, even if it was killed."""
    Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
