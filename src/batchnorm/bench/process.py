"""A network trained in its own process, since keeping freed memory is a setting of the process."""

from __future__ import annotations

import gc
import multiprocessing
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import torch

from batchnorm.bench import networks
from batchnorm.bench.case import time_calls
from batchnorm.bench.rounds import Sample
from batchnorm.children import signals_blocked
from batchnorm.memory import keep_memory
from batchnorm.passes.upgrade import upgrade


class Process:
    """A candidate in a child process; a context manager.

    tuned: our layers, channels-last, with freed memory kept; otherwise torch with its defaults.
    """

    def __init__(self, name: str, size: int, batch: int, *, tuned: bool) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the memory and its settings
        self._pipe, child_pipe = context.Pipe()
        arguments = (child_pipe, name, size, batch, tuned, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with signals_blocked(signal.SIGINT):  # permanently: the child ends when the parent closes the pipe
            self._process.start()
        child_pipe.close()

    def __call__(self) -> Sample:
        """One sample; between samples the child waits for a message."""
        self._pipe.send(None)
        sample: Sample = self._pipe.recv()
        return sample

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()  # which ends the child
        self._process.join()


def _serve(pipe: Connection, name: str, size: int, batch: int, tuned: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    model = networks.build(name)
    x = torch.randn(networks.shape(name, size, batch))
    if tuned:
        keep_memory()
        model, _ = upgrade(model)
        model, x = networks.to_layout(model, x, "channels-last")
    sample = time_calls("step", networks.step(model, x), networks.NETWORKS[name])
    gc.disable()  # as for the candidates in the parent
    with suppress(EOFError, OSError):  # the parent has closed its end, or has died
        while True:
            pipe.recv()
            pipe.send(sample())
