"""The order of training examples, a function of the seed and the step number."""

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
    """Epochs of shuffled examples in full batches; an incomplete last batch of an epoch is dropped.

    examples: number of examples.
    batch_size: examples per step, over all processes.
    shards: number of examples in each shard, in the order of their indices. None: the data has no shards,
        and random but fixed sets of `shard_size` examples are used, since files may be sorted by class.
    shuffle: "shards" shuffles the order of the shards in each epoch, but not the examples within a shard;
        "within-shards" shuffles both (section 4.2.1, item 6).

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
        # cache two epochs: that of training, and that of the batches for population statistics
        self._shuffled = lru_cache(2)(self._shuffle)

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that the 0-based `step` belongs to."""
        return step // self.batches_per_epoch

    def share(self, ranks: int) -> int:
        """Examples of a batch per process. Raises: ValueError unless the batch divides evenly among `ranks`."""
        if self.batch_size % ranks:
            raise ValueError(
                f"a batch of {self.batch_size} does not divide among {ranks} processes: make it a multiple"
            )
        return self.batch_size // ranks

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """(batch_size / ranks,) int64: the indices of the examples of one process at the 0-based `step`.

        The processes take contiguous parts of the batch that a single process would have.
        """
        share = self.share(ranks)
        epoch, at = divmod(step, self.batches_per_epoch)
        start = at * self.batch_size + rank * share
        return self._shuffled(epoch)[start : start + share]

    def _shuffle(self, epoch: int) -> Tensor:
        """(N,) int64: the indices of all examples, in the order of this epoch."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        places = torch.randperm(int(self._shard[-1]) + 1, generator=generator)
        key = places[self._shard].double()
        if self.shuffle == "within-shards":
            key += torch.rand(len(key), generator=generator, dtype=torch.float64)
        return self._examples[key.argsort(stable=True)]


def derive_seed(*numbers: int) -> int:
    """A 32-bit seed, the size that torch's generator uses, as a hash of `numbers`."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "big")
