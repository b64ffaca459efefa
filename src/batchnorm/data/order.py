"""The order in which a run sees its examples: a function of its seed and the number of the step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from batchnorm.data.idx import DataError

Shuffle = Literal["shards", "within-shards"]


class Order:
    """Epochs of shuffled examples in full batches; what does not fill a batch is left out of its epoch.

    examples: how many there are.
    batch_size: examples a step, over all processes.
    shards: how many examples each shard holds, in the order of their indices. None: the data comes in no
        shards, and a random but fixed choice of `shard_size` examples stands for each, since files may be
        sorted by class.
    shuffle: each epoch shuffles the order of the shards; "within-shards" also the examples in each, where
        with "shards" the same examples follow each other every time (section 4.2.1, item 6).

    Raises: DataError when the examples do not fill a batch.
    """

    def __init__(
        self,
        examples: int,
        batch_size: int,
        *,
        shards: Sequence[int] | None = None,
        shard_size: int = 1000,
        shuffle: Shuffle = "within-shards",
        seed: int = 0,
    ) -> None:
        if examples < batch_size:
            raise DataError(f"{examples:,} training images do not fill one batch of {batch_size:,}")
        if shards is not None and sum(shards) != examples:
            raise ValueError(f"the shards hold {sum(shards)} examples together, not {examples}")
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.batches_per_epoch = examples // batch_size
        if shards is None:
            self._examples = torch.randperm(examples, generator=torch.Generator().manual_seed(0))
            self._shard = torch.arange(examples) // shard_size
        else:
            self._examples = torch.arange(examples)
            self._shard = torch.arange(len(shards)).repeat_interleave(torch.tensor(shards))
        # two epochs at hand: the one in training, and the one that population statistics are taken over
        self._shuffled = lru_cache(2)(self._shuffle)

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that the 0-based `step` belongs to."""
        return step // self.batches_per_epoch

    def share(self, ranks: int) -> int:
        """Examples of a batch in each of `ranks` processes. Raises: ValueError unless that comes out even."""
        if self.batch_size % ranks:
            raise ValueError(
                f"a batch of {self.batch_size} does not divide among {ranks} processes: make it a multiple"
            )
        return self.batch_size // ranks

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """(batch_size / ranks,) int64: the indices of the 0-based `step`, those of one of `ranks` processes.

        The processes take consecutive parts: together they see the batch that one alone would.
        """
        share = self.share(ranks)
        epoch, at = divmod(step, self.batches_per_epoch)
        start = at * self.batch_size + rank * share
        return self._shuffled(epoch)[start : start + share]

    def _shuffle(self, epoch: int) -> Tensor:
        """(N,) int64: all examples, in the order of this epoch."""
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        places = torch.randperm(int(self._shard[-1]) + 1, generator=generator)
        key = places[self._shard].double()
        if self.shuffle == "within-shards":
            key += torch.rand(len(key), generator=generator, dtype=torch.float64)
        return self._examples[key.argsort(stable=True)]


def mixed(*numbers: int) -> int:
    """A seed of 32 bits, which is what torch's generator takes in, that depends on all of `numbers`."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "big")
