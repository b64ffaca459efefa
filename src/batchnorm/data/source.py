"""Labelled images by index: what a data set is to a loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Split = Literal["train", "val"]


class Unreadable(Exception):
    """One image that cannot be read, while the rest of the data set is fine: its `name`, and `why`."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name, self.why = name, why

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


class Source(Protocol):
    """A split of a data set. It can be pickled, and holds no open file when it is.

    classes: number of classes, the same in both splits.
    channels: 1 or 3, of every image.
    shards: how many examples each shard file holds, in the order of their indices; None where the data comes
        in no shards.
    """

    @property
    def classes(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def shards(self) -> tuple[int, ...] | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """An image, uint8 (C, H, W), and its class.

        Raises: Unreadable for an image that is broken; DataError when what it lies in is gone.
        """

    def name(self, index: int, /) -> str:
        """What to call an image in a message: its path, or its shard and key."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """Images of one size, all of them in memory.

    images: (N, C, H, W) uint8.
    labels: (N,) int64.
    title: of the data set, for messages.
    """

    images: Tensor
    labels: Tensor
    classes: int
    title: str
    shards: None = None

    @property
    def channels(self) -> int:
        return self.images.size(1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"
