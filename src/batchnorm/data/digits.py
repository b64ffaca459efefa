"""The MNIST experiment's data: the package's own digits, a folder of IDX files, or a data set of torchvision."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from torch import Tensor

from batchnorm.data import idx
from batchnorm.data.data_sets import SHIPPED
from batchnorm.data.idx import DataError
from batchnorm.requirements import install_command

_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # apt install dataset-fashion-mnist
_DOWNLOADS = Path("~/.cache/batchnorm")
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


@dataclass(frozen=True, eq=False)
class Digits:
    """Grey images and their classes, split into training and test set.

    train_images, test_images: (N, H, W) uint8.
    train_labels, test_labels: (N,) uint8.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def describe(self, source: str) -> str:
        """A description, e.g. 'mnist-10k: 8,000 training and 2,000 test images of 28×28'."""
        height, width = self.train_images.shape[1:]
        train, test = len(self.train_images), len(self.test_images)
        return f"{source}: {train:,} training and {test:,} test images of {height}×{width}"

    def expect_batch(self, size: int) -> None:
        """Raise DataError unless the training images fill a batch of `size`."""
        if len(self.train_images) < size:
            raise DataError(f"{len(self.train_images)} training images do not fill one batch of {size}")

    @classmethod
    def load(cls, source: str = SHIPPED) -> Digits:
        """Load a data set.

        source: "mnist-10k", the 10,000 digits in this package; "mnist" or "fashion-mnist", downloaded by
            torchvision to ~/.cache/batchnorm when not there yet (Fashion-MNIST is also found where Debian's
            package dataset-fashion-mnist puts it); or a folder with IDX files, gzipped or not.

        Raises: DataError for data that is missing, truncated or inconsistent.
        """
        if source == SHIPPED:
            with as_file(files("batchnorm.data") / "mnist_10k") as folder:
                return cls._from_folder(folder)
        if source == "fashion-mnist" and _DEBIAN_FASHION_MNIST.is_dir():
            return cls._from_folder(_DEBIAN_FASHION_MNIST)
        if source in _TORCHVISION:
            return cls._from_torchvision(_TORCHVISION[source])
        folder = Path(source).expanduser()
        if not folder.is_dir():
            names = ", ".join((SHIPPED, *_TORCHVISION))
            raise DataError(f"no data set {source!r}: name a folder with IDX files, or one of {names}")
        return cls._from_folder(folder)

    @classmethod
    def _from_folder(cls, folder: Path) -> Digits:
        train = _split(folder, "train")
        test = _split(folder, "t10k")
        if train[0].shape[1:] != test[0].shape[1:]:
            raise DataError(
                f"{folder}: training images are {tuple(train[0].shape[1:])} pixels, test images "
                f"{tuple(test[0].shape[1:])}; they must agree"
            )
        return cls(*train, *test)

    @classmethod
    def _from_torchvision(cls, name: str) -> Digits:
        try:
            from torchvision import datasets
        except ImportError:
            raise DataError(
                f"{name} comes through torchvision, which is not installed: {install_command('train')}, "
                f"or use the digits in this package with --data {SHIPPED}"
            ) from None
        root = _DOWNLOADS.expanduser()
        try:
            train, test = (
                getattr(datasets, name)(root, train=train, download=True) for train in (True, False)
            )
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
            raise DataError(
                f"torchvision could not load {name} from {root} ({reason}): without a network, put its four IDX "
                "files into a folder and pass --data FOLDER, or use the digits in this package "
                f"with --data {SHIPPED}"
            ) from None
        return cls(train.data, train.targets.byte(), test.data, test.targets.byte())


def _split(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    images_path, labels_path = _find(folder, f"{name}-images", 3), _find(folder, f"{name}-labels", 1)
    images, labels = idx.read(images_path), idx.read(labels_path)
    for path, array, dimensions in ((images_path, images, 3), (labels_path, labels, 1)):
        if array.dim() != dimensions:
            raise DataError(
                f"{path} has {array.dim()} dimensions, expected {dimensions}: is it the right file?"
            )
    if len(images) != len(labels):
        raise DataError(
            f"{images_path.name} has {len(images):,} images but {labels_path.name} has {len(labels):,} "
            f"labels: the files in {folder} do not belong together"
        )
    if len(images) == 0:
        raise DataError(f"{images_path} holds no images")
    return images, labels


def _find(folder: Path, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{dash}idx{dimensions}-ubyte{gz}" for dash in "-." for gz in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has no {names[0]}, with or without .gz")
