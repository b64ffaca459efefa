"""Image files in ImageNet's layout: train/CLASS/*.jpg and val/CLASS/*.jpg."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from batchnorm.data.idx import DataError
from batchnorm.data.images import decode
from batchnorm.data.names import Names
from batchnorm.data.source import Split

_LISTED = 5


class ImageFolder:
    """The images of a split, sorted by class and name; the classes are train's folders in alphabetical order.

    Raises: DataError without images in every class, or when val's classes are not train's.
    """

    channels = 3
    shards = None

    def __init__(self, root: Path, split: Split) -> None:
        classes = _classes(root, "train")
        if split == "val":
            _expect_equal(root, classes, _classes(root, "val"))
        self.classes = len(classes)
        self._folder = root / split
        try:
            found = make_dataset(self._folder, classes, extensions=IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise DataError(f"{self._folder}: {error}") from None
        self._names = Names(os.path.relpath(path, self._folder) for path, _ in found)
        self._labels = torch.tensor([label for _, label in found])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = int(self._labels[index])
        name = self.name(index)
        return decode(Path(name), name), label

    def name(self, index: int) -> str:
        return str(self._folder / self._names[index])


def _classes(root: Path, split: Split) -> dict[str, int]:
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"{root} has no folder {split}: images are looked for in {split}/CLASS/*.jpg")
    try:
        numbers: dict[str, int] = find_classes(folder)[1]
    except FileNotFoundError:
        raise DataError(f"{folder} has no folders: each class needs one, with its images in it") from None
    return numbers


def _expect_equal(root: Path, train: dict[str, int], val: dict[str, int]) -> None:
    unmatched = [f"{name} only in train" for name in train if name not in val]
    unmatched += [f"{name} only in val" for name in val if name not in train]
    if unmatched:
        more = f" and {len(unmatched) - _LISTED} more" if len(unmatched) > _LISTED else ""
        raise DataError(
            f"{root}: train and val must have the same classes, but {', '.join(unmatched[:_LISTED])}{more}"
        )
