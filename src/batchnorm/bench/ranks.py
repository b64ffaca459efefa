"""Two or more processes in step: a layer that speaks with the others, beside one that does not."""

from __future__ import annotations

import gc
import math
import multiprocessing
import signal
import statistics
import tempfile
import time
from contextlib import suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from batchnorm.bench.cold import Ring, counts, passes
from batchnorm.bench.rounds import Sample
from batchnorm.layers import BatchNorm
from batchnorm.memory import keep_memory
from batchnorm.statistics import Sync

_TURNS = 9


class Ranks:
    """Processes of one thread each, joined by gloo; a context manager.

    Called with "sync", "plain" or "collectives" it is a contender. All have their turns in one go, several times, and
    a sample is the median of these: a system that stalls a process which waits for others would else be measured.
    """

    def __init__(self, count: int, shape: tuple[int, ...], quick: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        self._measured: dict[str, Sample] = {}
        self.calls = _calls(shape)
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # see process.py
        try:
            for rank in range(count):
                pipe, theirs = context.Pipe()
                process = context.Process(
                    target=_serve,
                    args=(theirs, str(Path(self._folder.name) / "store"), rank, count, shape, quick),
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._pipes.append(pipe)
                self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __call__(self, who: str) -> Sample:
        """One sample: of each pass the time of the slower rank."""
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


def _calls(shape: tuple[int, ...]) -> int:
    """Few in a sample: a system that stalls one of the processes now and then would do so in every longer one."""
    return 1 if math.prod(shape) > 10**6 else 8


def _serve(pipe: Connection, store: str, rank: int, count: int, shape: tuple[int, ...], quick: bool) -> None:
    torch.set_num_threads(1)
    keep_memory()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    seed = torch.randn(shape)
    calls = _calls(shape)
    cold = max(calls, counts(seed, quick)[1])
    inputs = Ring([seed.clone().requires_grad_() for _ in range(cold)], calls)
    gradients = [seed.clone() for _ in range(calls)]
    layers = {"sync": BatchNorm(shape[1], statistics=Sync()), "plain": BatchNorm(shape[1])}
    contenders = {who: passes(layer, layer, inputs, [], gradients) for who, layer in layers.items()}
    contenders["collectives"] = partial(_collectives, shape[1], count, calls)
    gc.disable()
    with suppress(EOFError, OSError):  # the parent has closed its end, or is gone
        while True:
            pipe.recv()
            turns = []
            for _ in range(_TURNS):
                dist.barrier()
                turns.append({who: contender() for who, contender in contenders.items()})
            pipe.send({who: _median([turn[who] for turn in turns]) for who in contenders})
    dist.destroy_process_group()


def _collectives(channels: int, ranks: int, calls: int) -> Sample:
    """What Sync cannot do without, alone: the exchange of each pass, of as many bytes."""
    row, sums = (
        torch.zeros(1 + 2 * channels, dtype=torch.float64),
        torch.zeros(2, channels, dtype=torch.float64),
    )
    rows = [torch.empty_like(row) for _ in range(ranks)]
    start = time.perf_counter()
    for _ in range(calls):
        dist.all_gather(rows, row)
    middle = time.perf_counter()
    for _ in range(calls):
        dist.all_reduce(sums)
    end = time.perf_counter()
    return {"forward": (middle - start) / calls, "backward": (end - middle) / calls}


def _median(samples: list[Sample]) -> Sample:
    return {part: statistics.median(sample[part] for sample in samples) for part in samples[0]}
