"""Image files in ImageNet's layout: train/CLASS/*.jpg and val/CLASS/*.jpg."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from batchnorm.data.idx import DataError
from batchnorm.data.images import decode
from batchnorm.data.names import Names
from batchnorm.data.source import Split

_LISTED = 5
_IMAGES = (*IMG_EXTENSIONS, ".gif")


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
        self.classes, self.class_names = len(classes), tuple(classes)
        self._folder = root / split
        try:
            found = make_dataset(self._folder, classes, is_valid_file=is_image)
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
    names = sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_hidden(entry.name)
    )
    if not names:
        raise DataError(f"{folder} has no folders: each class needs one, with its images in it")
    if len(names) == 1 and split == "train":
        raise DataError(f"{folder} has a single class, {names[0]}: there is nothing to tell apart")
    return {name: number for number, name in enumerate(names)}


def is_image(path: str) -> bool:
    """Whether a file has the name of an image, and no hidden one."""
    return path.lower().endswith(_IMAGES) and not _is_hidden(os.path.basename(path))


def _is_hidden(name: str) -> bool:
    """Such as .ipynb_checkpoints, and the ._name.jpg that macOS leaves beside name.jpg."""
    return name.startswith(".")


def _expect_equal(root: Path, train: dict[str, int], val: dict[str, int]) -> None:
    unmatched = [f"{name} only in train" for name in train if name not in val]
    unmatched += [f"{name} only in val" for name in val if name not in train]
    if unmatched:
        more = f" and {len(unmatched) - _LISTED} more" if len(unmatched) > _LISTED else ""
        raise DataError(
            f"{root}: train and val must have the same classes, but {', '.join(unmatched[:_LISTED])}{more}"
        )
