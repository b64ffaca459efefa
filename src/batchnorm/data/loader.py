"""Batches of transformed images: shuffled and endless for training, once and in order for evaluation.

A batch depends only on the seed and its step number, and not on the number of loader processes or on where a
run was resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.data.corrupt import Corrupt
from batchnorm.data.idx import DataError
from batchnorm.data.order import Order, derive_seed
from batchnorm.data.processes import Processes
from batchnorm.data.source import Source, Unreadable

Transform = Callable[[Tensor], Tensor]


class Batch(NamedTuple):
    """images: (n, ...), what the transform makes of n images, stacked. labels: (n,) int64."""

    images: Tensor
    labels: Tensor


class Loader:
    """The training batches of one process.

    source: the examples. An unreadable image is replaced by the next readable one.
    transform: from an image, uint8 (C, H, W), to a tensor. It may draw from torch's global generator, which
        is seeded for each example and epoch, and restored afterwards.
    order: the examples of each batch, over all processes.
    corrupt: counts the images that this process could not read.
    rank, ranks: of this process; each process loads an equal part of every batch.
    processes: number of loader processes, which need a picklable source and transform. 0: batches are loaded
        in this process when they are needed.

    Raises: ValueError when a batch does not divide among the ranks.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        order: Order,
        corrupt: Corrupt,
        *,
        rank: int = 0,
        ranks: int = 1,
        processes: int = 0,
    ) -> None:
        order.share(ranks)
        self.corrupt = corrupt
        self._order, self._rank, self._ranks, self._processes = order, rank, ranks, processes
        self._reader = _Reader(source, transform, order.seed, corrupt.limit)

    @property
    def batches_per_epoch(self) -> int:
        return self._order.batches_per_epoch

    def batches(self, steps: Iterable[int]) -> Iterator[Batch]:
        """The batches of these steps, 0-based over all epochs; infinite for `itertools.count(step)`.

        Raises: DataError when too many images cannot be read, or a shard is missing.
        """
        answers = Processes(self._reader, self._requests(steps), self._processes)
        return _batches(answers, self.corrupt)

    def _requests(self, steps: Iterable[int]) -> Iterator[_Request]:
        for step in steps:
            indices = self._order.batch(step, self._rank, self._ranks).tolist()
            yield _Request(self._order.epoch(step), indices, replace=True)


class SequentialLoader:
    """All examples once, in the order of their indices; may be iterated repeatedly.

    Each of `ranks` processes gets a contiguous part. Unreadable images are skipped, so a batch may be smaller
    than `batch_size`. The other arguments are those of `Loader`.

    rounds: the largest number of batches of any process, without skipped images.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batch_size: int,
        corrupt: Corrupt,
        *,
        rank: int = 0,
        ranks: int = 1,
        processes: int = 0,
    ) -> None:
        self.corrupt = corrupt
        self.rounds = math.ceil(math.ceil(len(source) / ranks) / batch_size)
        start, end = (len(source) * at // ranks for at in (rank, rank + 1))
        requests = [
            _Request(0, list(range(at, min(at + batch_size, end))), replace=False)
            for at in range(start, end, batch_size)
        ]
        self._answers = Processes(_Reader(source, transform, 0, corrupt.limit), requests, processes)

    def __iter__(self) -> Iterator[Batch]:
        """Raises: DataError when too many images cannot be read, or a shard is missing."""
        return _batches(self._answers, self.corrupt)


@dataclass(frozen=True)
class _Request:
    epoch: int
    indices: list[int]
    replace: bool


@dataclass(frozen=True)
class _Answer:
    """`batch` is None if it would be empty; `unreadable` has the reasons by name of the image."""

    batch: Batch | None
    unreadable: dict[str, str]


def _batches(answers: Iterable[_Answer], corrupt: Corrupt) -> Iterator[Batch]:
    for answer in answers:
        corrupt.add(answer.unreadable)
        if answer.batch is not None:
            yield answer.batch


@dataclass(frozen=True)
class _Reader:
    """Reads the batch of a request, in a loader process or in this one.

    most: the largest tolerated number of unreadable images; a batch with more is abandoned.
    """

    source: Source
    transform: Transform
    seed: int
    limit: int

    def __call__(self, request: _Request) -> _Answer:
        examples, unreadable = [], dict[str, str]()
        with _single_thread(), _preserve_random_state():
            for index in request.indices:
                example = self._example(index, request, unreadable)
                if len(unreadable) > self.limit:
                    return _Answer(None, unreadable)
                if example is not None:
                    examples.append(example)
        if not examples:
            return _Answer(None, unreadable)
        images, labels = zip(*examples, strict=True)
        return _Answer(Batch(torch.stack(images), torch.tensor(labels)), unreadable)

    def _example(
        self, index: int, request: _Request, unreadable: dict[str, str]
    ) -> tuple[Tensor, int] | None:
        """The transformed image and its class; None if it cannot be read and is not replaced."""
        examples = len(self.source)
        for at in range(index, index + examples if request.replace else index + 1):
            try:
                image, label = self.source[at % examples]
            except Unreadable as error:
                unreadable[error.name] = error.why
                if len(unreadable) > self.limit:
                    return None
                continue
            # not torch.manual_seed, which looks for accelerators at each call and takes 50 times as long
            torch.default_generator.manual_seed(derive_seed(self.seed, request.epoch, at % examples))
            return self.transform(image), label
        if request.replace:
            raise DataError(f"none of the {examples:,} images can be read, e.g. {self.source.name(index)}")
        return None


@contextmanager
def _single_thread() -> Iterator[None]:
    """Use one thread, as in a loader process: the rounding of a sum depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _preserve_random_state() -> Iterator[None]:
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
