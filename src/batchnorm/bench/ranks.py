"""Processes in step: contenders that speak with the same contenders of the others."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from batchnorm.bench.rounds import Contender, Sample
from batchnorm.children import signals_blocked
from batchnorm.memory import keep_memory

Build = Callable[[], Mapping[str, Contender]]  # called in each process; what is sent there must be picklable


class Ranks:
    """Processes of one thread each, joined by gloo; a context manager.

    Called with the name of one of the contenders that `build` makes it is that contender. All have their turns in one
    go, several times, and a sample is the median of these: a system that stalls a process which waits for others would
    else be measured.
    """

    def __init__(self, count: int, build: Build, turns: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        self._measured: dict[str, Sample] = {}
        store = str(Path(self._folder.name) / "store")
        with signals_blocked(signal.SIGINT):  # for good: they end when the parent closes the pipes
            for rank in range(count):
                pipe, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, store, rank, count, build, turns), daemon=True
                )
                process.start()
                theirs.close()
                self._pipes.append(pipe)
                self._processes.append(process)

    def __call__(self, who: str) -> Sample:
        """One sample: of each part the time of the slowest rank."""
        if who not in self._measured:
            for pipe in self._pipes:
                pipe.send(None)
            of_ranks: list[dict[str, Sample]] = [pipe.recv() for pipe in self._pipes]
            self._measured = {
                each: {part: max(its[each][part] for its in of_ranks) for part in sample}
                for each, sample in of_ranks[0].items()
            }
        return self._measured.pop(who)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def _serve(pipe: Connection, store: str, rank: int, count: int, build: Build, turns: int) -> None:
    torch.set_num_threads(1)
    keep_memory()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    contenders = build()
    gc.disable()
    with suppress(EOFError, OSError):  # the parent has closed its end, or is gone
        while True:
            pipe.recv()
            samples = []
            for _ in range(turns):
                dist.barrier()
                samples.append({who: contender() for who, contender in contenders.items()})
            pipe.send({who: _median([sample[who] for sample in samples]) for who in contenders})
    dist.destroy_process_group()


def _median(samples: list[Sample]) -> Sample:
    return {part: statistics.median(sample[part] for sample in samples) for part in samples[0]}
