"""Image files of unknown class, for a trained network to classify."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from batchnorm.data.folder import is_image
from batchnorm.data.idx import DataError
from batchnorm.data.images import decode

UNKNOWN = 0  # the label of every image, which has none


class ImageFiles:
    """The images in `places`, files or folders with images at any depth; a Source whose labels mean nothing.

    channels: 3, or 1 for images that become grey.

    Raises: DataError for a place that does not exist, or a folder without images.
    """

    shards = None

    def __init__(self, places: Iterable[Path], channels: int, classes: int) -> None:
        self.channels, self.classes = channels, classes
        self.paths = list(dict.fromkeys(path for place in places for path in _images(place)))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return decode(self.paths[index], self.name(index), self.channels), UNKNOWN

    def name(self, index: int) -> str:
        return str(self.paths[index])


def _images(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise DataError(f"there is no image {place}")
    found = []
    for folder, inner, names in os.walk(place, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found += [Path(folder, name) for name in sorted(names) if is_image(name)]
    if not found:
        raise DataError(f"{place} has no images in it")
    return found
