"""The images that could not be read: counted, named, and when they are too many, the end of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from batchnorm.data.idx import DataError

_SHOWN = 3


class Corrupt:
    """A tally of distinct images that could not be read.

    share: the largest share of the images that a run puts up with.
    images: how many the data set has.
    found: why, by the image's name; the one met first comes first.
    """

    def __init__(self, share: float, images: int) -> None:
        self.share, self.images = share, images
        self.found: dict[str, str] = {}

    @property
    def most(self) -> int:
        """How many unreadable images a run puts up with."""
        return math.floor(round(self.share * self.images, 6))  # 0.29 * 100 is a little less than 29

    def add(self, found: Mapping[str, str]) -> None:
        """Count images, by name, that cannot be read. Raises: DataError when they have become too many."""
        self.found.update(found)
        if len(self.found) > self.most:
            raise DataError(
                f"{self}; more than {self.most:,} stop a run: mend or remove them, or raise corrupt_share, "
                f"now {self.share:g}"
            )

    @property
    def names(self) -> list[str]:
        return list(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        """E.g. '2 of 8,000 images cannot be read: a.jpg: cannot identify image file, b.jpg: ...'."""
        shown = [f"{name}: {why}" for name, why in list(self.found.items())[:_SHOWN]]
        more = [f"and {len(self) - _SHOWN:,} more"] if len(self) > _SHOWN else []
        which = f": {', '.join([*shown, *more])}" if shown else ""
        return f"{len(self):,} of {self.images:,} images cannot be read{which}"

    def state_dict(self) -> dict[str, dict[str, str]]:
        return {"found": dict(self.found)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, str]]) -> None:
        self.found = dict(state["found"])
