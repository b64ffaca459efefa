"""Processes that begin with torch imported, forked from one that does nothing else: it takes milliseconds, not seconds.

Each is real: it has a pid, dies of signals and imports batchnorm for itself, whatever the tests' own process did.
"""

import atexit
import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["torch", "torchvision", "accelerate", "matplotlib"])

_STARTED: list["Forked"] = []
# How a process ended can be read once, and each start asks it of every other process: where two threads read at once,
# multiprocessing takes the second for a process that was lost, and says 255.
_ASKING = threading.Lock()


@contextmanager
def quick_starts() -> Iterator[None]:
    """Processes that the library would spawn, each of which would import torch, are forked as well."""
    spawning = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: CONTEXT  # type: ignore[assignment]
    try:
        yield
    finally:
        multiprocessing.get_context = spawning


@atexit.register
def _end() -> None:
    """None outlives the tests; before multiprocessing waits for all of them."""
    for each in _STARTED:
        if each.running:
            each.kill()


def _begin(
    work: Callable[..., object], arguments: tuple[object, ...], out: Path, env: Mapping[str, str], cwd: Path
) -> None:
    os.setsid()
    for path, descriptor in ((out, 1), (out.with_suffix(".err"), 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    try:
        work(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Forked:
    """A process that does `work`, in a session of its own; what it says goes to the file `out` and one beside it."""

    def __init__(
        self,
        work: Callable[..., object],
        *arguments: object,
        out: Path,
        env: Mapping[str, str] = os.environ,
        cwd: Path | None = None,
    ) -> None:
        self._out, self._read = out, 0
        for path in (out, out.with_suffix(".err")):  # here, for it may be killed before it begins
            path.touch()
        begin = (work, arguments, out, dict(env), cwd or Path.cwd())
        self._process = CONTEXT.Process(target=_begin, args=begin)
        with _ASKING:
            self._process.start()
        _STARTED.append(self)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._out.with_suffix(".err").read_text()

    @property
    def running(self) -> bool:
        return self._code() is None

    def _code(self) -> int | None:
        with _ASKING:
            return self._process.exitcode

    def wait_for(self, word: str, seconds: float = 200) -> None:
        """Until it has printed a line with `word`, beyond those that were waited for before."""
        until = time.monotonic() + seconds
        while True:
            running = self.running  # asked first: what it says last is read below
            for line in self.out[self._read :].splitlines(keepends=True):
                if not line.endswith("\n"):
                    break
                self._read += len(line)
                if word in line:
                    return
            assert running, f"ended without {word!r}: {self.err}"
            assert time.monotonic() < until, f"nothing with {word!r} for {seconds} s: {self.out}"
            time.sleep(0.01)

    def join(self, seconds: float | None = None) -> int | None:
        """How it ended, as a subprocess says it; None when it goes on."""
        until = math.inf if seconds is None else time.monotonic() + seconds
        while (code := self._code()) is None and time.monotonic() < until:
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        self._process.kill()
