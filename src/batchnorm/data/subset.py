"""A fixed random subset of a data set."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from batchnorm.data.source import Source, class_names


@dataclass(frozen=True)
class Subset:
    """The first `images` examples of a fixed random order of `source`, whose files may be sorted by class."""

    source: Source
    images: int
    shards: None = None
    _order: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        order = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(0))
        object.__setattr__(self, "_order", order[: self.images])

    @property
    def classes(self) -> int:
        """The number of classes of the whole data set."""
        return self.source.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the whole data set."""
        return class_names(self.source)

    @property
    def channels(self) -> int:
        """The channels of every image."""
        return self.source.channels

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.source[int(self._order[index])]

    def name(self, index: int) -> str:
        """The name of the image in the source."""
        return self.source.name(int(self._order[index]))
