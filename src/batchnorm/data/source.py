"""The interface of data sets: labelled images by index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Split = Literal["train", "val"]


class Unreadable(Exception):
    """An image cannot be read, with its `name` and the reason `why`; the rest of the data set is usable."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name, self.why = name, why

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


class Source(Protocol):
    """A split of a data set. It can be pickled; the pickle holds no open files. It may have `class_names`, see there.

    classes: number of classes, the same in both splits.
    channels: of every image, 1 or 3.
    shards: number of examples in each shard file, in the order of their indices; None if the data has no
        shards.
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

        Raises: Unreadable for a broken image; DataError when its shard is missing.
        """

    def name(self, index: int, /) -> str:
        """The name of an image for messages: its path, or its shard and key."""


def class_names(source: Source) -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers; the numbers themselves where the data set has none."""
    names: tuple[str, ...] = getattr(source, "class_names", ())
    return names if len(names) == source.classes else tuple(map(str, range(source.classes)))


@dataclass(frozen=True, eq=False)
class InMemory:
    """A data set of images of one size, in memory.

    images: (N, C, H, W) uint8.
    labels: (N,) int64.
    title: of the data set, for messages.
    class_names: of each class; () for numbers.
    """

    images: Tensor
    labels: Tensor
    classes: int
    title: str
    class_names: tuple[str, ...] = ()
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
