"""Candidates that run on several ranks at once and communicate by collectives."""

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

from batchnorm.bench.rounds import Candidate, Sample
from batchnorm.children import signals_blocked
from batchnorm.memory import keep_memory

Build = Callable[[], Mapping[str, Candidate]]  # called in each process; must be picklable


class Ranks:
    """A gloo process group of processes with one thread each; a context manager.

    Calling it with the name of a candidate of `build` returns a sample of that candidate. All candidates are measured
    together, `turns` times, and the sample is the median, so that single stalls by the scheduler do not count.
    """

    def __init__(self, count: int, build: Build, turns: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        self._measured: dict[str, Sample] = {}
        store = str(Path(self._folder.name) / "store")
        with signals_blocked(signal.SIGINT):  # permanently: the children end when the parent closes the pipes
            for rank in range(count):
                pipe, child_pipe = context.Pipe()
                process = context.Process(
                    target=_serve, args=(child_pipe, store, rank, count, build, turns), daemon=True
                )
                process.start()
                child_pipe.close()
                self._pipes.append(pipe)
                self._processes.append(process)

    def __call__(self, name: str) -> Sample:
        """One sample: the time of the slowest rank, for each part."""
        if name not in self._measured:
            for pipe in self._pipes:
                pipe.send(None)
            of_ranks: list[dict[str, Sample]] = [pipe.recv() for pipe in self._pipes]
            self._measured = {
                each: {part: max(samples[each][part] for samples in of_ranks) for part in sample}
                for each, sample in of_ranks[0].items()
            }
        return self._measured.pop(name)

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
    candidates = build()
    gc.disable()
    with suppress(EOFError, OSError):  # the parent has closed its end, or has died
        while True:
            pipe.recv()
            samples = []
            for _ in range(turns):
                dist.barrier()
                samples.append({name: candidate() for name, candidate in candidates.items()})
            pipe.send({name: _median([sample[name] for sample in samples]) for name in candidates})
    dist.destroy_process_group()


def _median(samples: list[Sample]) -> Sample:
    return {part: statistics.median(sample[part] for sample in samples) for part in samples[0]}
