"""Data sets by name or path."""

from __future__ import annotations

from pathlib import Path

import torch

from batchnorm.data.data_sets import CIFAR_10, DIGITS, FASHION, NAMES
from batchnorm.data.digits import Digits
from batchnorm.data.idx import DataError
from batchnorm.data.source import InMemory, Source, Split
from batchnorm.requirements import install_command

_DOWNLOADS = Path("~/.cache/batchnorm")


def load(source: str, split: Split) -> Source:
    """One split of a data set.

    source: "mnist-10k", "mnist", "fashion-mnist" (see `Digits.load`) or "cifar-10", which torchvision
        downloads to ~/.cache/batchnorm when it is not there yet; a folder with images (train/CLASS/*.jpg and
        val/CLASS/*.jpg), with WebDataset shards (train-*.tar and val-*.tar) or with IDX files; or a pattern
        of shards that are named otherwise, e.g. "FOLDER/imagenet1k-{train,validation}-*.tar".

    Raises: DataError for data that is missing, truncated or inconsistent.
    """
    if source in DIGITS:
        return _digits(source, split)
    if source == CIFAR_10:
        return _cifar_10(split)
    path = Path(source).expanduser()
    if path.suffix == ".tar":
        return _files(path, split)
    if not path.is_dir():
        names = ", ".join(NAMES)
        raise DataError(
            f"no data set {source!r}: name a folder with images, shards or IDX files, or one of {names}"
        )
    if any(path.glob("train-*.tar")) or any(path.glob("val-*.tar")):
        return _files(path / "{train,val}-*.tar", split)
    if (path / "train").is_dir() or (path / "val").is_dir():
        return _files(path, split)
    if any(path.glob("*-ubyte*")):
        return _digits(source, split)
    raise DataError(
        f"{path} holds no data set: there is no train/CLASS/ with images, no train-*.tar and no "
        "train-images-idx3-ubyte"
    )


def _digits(source: str, split: Split) -> InMemory:
    digits = Digits.load(source)
    classes = int(max(digits.train_labels.max(), digits.test_labels.max())) + 1
    train = split == "train"
    images = digits.train_images if train else digits.test_images
    labels = digits.train_labels if train else digits.test_labels
    names = FASHION if source == "fashion-mnist" else ()
    return InMemory(images.unsqueeze(1), labels.long(), classes, f"{source} {split}", names)


def _cifar_10(split: Split) -> InMemory:
    root = _DOWNLOADS.expanduser()
    try:
        from torchvision.datasets import CIFAR10

        data = CIFAR10(root, train=split == "train", download=True)
    except ImportError:
        raise _no_torchvision(CIFAR_10) from None
    except (RuntimeError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
        raise DataError(
            f"torchvision could not load {CIFAR_10} from {root} ({reason}): without a network, unpack "
            "cifar-10-python.tar.gz there, or use the digits in this package, mnist-10k"
        ) from None
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    names = tuple(data.classes)
    return InMemory(images, torch.tensor(data.targets), len(names), f"{CIFAR_10} {split}", names)


def _files(path: Path, split: Split) -> Source:
    try:  # imported here, as the digits need neither torchvision nor Pillow
        from batchnorm.data.folder import ImageFolder
        from batchnorm.data.shards import Shards
    except ImportError:
        raise _no_torchvision("images in files") from None
    return Shards.load(path, split) if path.suffix == ".tar" else ImageFolder(path, split)


def _no_torchvision(what: str) -> DataError:
    return DataError(f"{what} need torchvision, which is not installed: {install_command('train')}")
