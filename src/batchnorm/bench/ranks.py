"""Two or more processes in step: a layer that speaks with the others, beside one that does not."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import tempfile
from contextlib import suppress
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


class Ranks:
    """Processes of one thread each, joined by gloo; a context manager.

    Called with "sync" or "plain" it is a contender: all ranks run that layer's passes at once.
    """

    def __init__(self, count: int, shape: tuple[int, ...], quick: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        self.calls, _ = counts(torch.empty(shape), quick)
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
        for pipe in self._pipes:
            pipe.send(who)
        samples: list[Sample] = [pipe.recv() for pipe in self._pipes]
        return {part: max(sample[part] for sample in samples) for part in samples[0]}

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


def _serve(pipe: Connection, store: str, rank: int, count: int, shape: tuple[int, ...], quick: bool) -> None:
    torch.set_num_threads(1)
    keep_memory()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    seed = torch.randn(shape)
    calls, cold = counts(seed, quick)
    inputs = Ring([seed.clone().requires_grad_() for _ in range(cold)], calls)
    gradients = [seed.clone() for _ in range(calls)]
    layers = {"sync": BatchNorm(shape[1], statistics=Sync()), "plain": BatchNorm(shape[1])}
    contenders = {who: passes(layer, layer, inputs, [], gradients) for who, layer in layers.items()}
    gc.disable()
    with suppress(EOFError, OSError):  # the parent has closed its end, or is gone
        while True:
            contender = contenders[pipe.recv()]
            dist.barrier()
            pipe.send(contender())
    dist.destroy_process_group()
