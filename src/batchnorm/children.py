"""Processes that this one starts: none dies of a Ctrl-C that is meant for it, and none outlives it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from threading import Thread

# Ctrl-C, and often SIGTERM, reach the whole group of processes; what they mean the parent decides.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_blocked(*signals: signal.Signals) -> Iterator[None]:
    """Block `signals`, by default both, in processes that are started meanwhile: these inherit the mask."""
    resource_tracker.ensure_running()  # the first process would bring it up, and its start unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals or STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_with_parent() -> None:
    """In a child: from now on, end at once when the parent has ended, however it did."""
    Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
