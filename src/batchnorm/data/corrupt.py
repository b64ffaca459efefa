"""Unreadable images: counted and named; too many of them stop a run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from batchnorm.data.idx import DataError

_LISTED = 3


class Corrupt:
    """The set of images that could not be read.

    share: the largest tolerated share of unreadable images.
    images: number of images in the data set.
    found: the reason for each image, by its name, in the order of discovery.
    """

    def __init__(self, share: float, images: int) -> None:
        self.share, self.images = share, images
        self.found: dict[str, str] = {}

    @property
    def limit(self) -> int:
        """The largest tolerated number of unreadable images."""
        return math.floor(round(self.share * self.images, 6))  # 0.29 * 100 is a little less than 29

    def add(self, found: Mapping[str, str]) -> None:
        """Add unreadable images, reasons by name. Raises: DataError when there are more than `limit`."""
        self.found.update(found)
        if len(self.found) > self.limit:
            raise DataError(
                f"{self}; more than {self.limit:,} stop a run: repair or remove them, or raise corrupt_share, "
                f"now {self.share:g}"
            )

    @property
    def names(self) -> list[str]:
        return list(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        """E.g. '2 of 8,000 images cannot be read: a.jpg: cannot identify image file, b.jpg: ...'."""
        listed = [f"{name}: {why}" for name, why in list(self.found.items())[:_LISTED]]
        more = [f"and {len(self) - _LISTED:,} more"] if len(self) > _LISTED else []
        names = f": {', '.join([*listed, *more])}" if listed else ""
        return f"{len(self):,} of {self.images:,} images cannot be read{names}"

    def state_dict(self) -> dict[str, dict[str, str]]:
        return {"found": dict(self.found)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, str]]) -> None:
        self.found = dict(state["found"])
