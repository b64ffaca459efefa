"""Data sets by name and by folder, and what is wrong with a folder."""

import gzip

import numpy as np
import pytest
import torch

from batchnorm.data import digits
from batchnorm.data.digits import Digits
from batchnorm.data.idx import DataError
from tests.data.test_idx import idx_bytes

RNG = np.random.default_rng(0)
FILES = {
    "train-images-idx3-ubyte": RNG.integers(0, 256, (70, 5, 5)),
    "train-labels-idx1-ubyte": RNG.integers(0, 10, 70),
    "t10k-images-idx3-ubyte": RNG.integers(0, 256, (20, 5, 5)),
    "t10k-labels-idx1-ubyte": RNG.integers(0, 10, 20),
}


@pytest.fixture
def folder(tmp_path):
    for name, array in FILES.items():
        (tmp_path / name).write_bytes(idx_bytes(array))
    return tmp_path


def test_the_shipped_digits_are_ten_thousand_of_mnist():
    data = Digits.load()
    assert data.train_images.shape == (8000, 28, 28)
    assert data.test_images.shape == (2000, 28, 28)
    assert data.train_images.dtype == data.train_labels.dtype == torch.uint8
    labels = torch.cat([data.train_labels, data.test_labels])
    # the class counts of the first 10,000 images of MNIST's training set
    assert labels.bincount().tolist() == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    ink = data.train_images[data.train_labels == 1].float().mean() / data.train_images.float().mean()
    assert ink < 0.7  # a one takes less ink than other digits: images and labels belong together


def test_a_folder_is_read_gzipped_or_not_and_with_either_spelling(folder):
    plain = Digits.load(str(folder))
    assert torch.equal(plain.test_labels, torch.from_numpy(FILES["t10k-labels-idx1-ubyte"]).byte())
    for name in FILES:
        path = folder / name
        (folder / f"{name.replace('-idx', '.idx')}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = Digits.load(str(folder))
    assert torch.equal(packed.train_images, plain.train_images)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=name):
        Digits.load(str(folder))


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("train-labels-idx1-ubyte", np.zeros(69), "70 images but .* 69 labels"),
        ("t10k-images-idx3-ubyte", np.zeros((20, 5, 6)), "must agree"),
        ("train-images-idx3-ubyte", np.zeros(70), "1 dimensions, expected 3"),
        ("t10k-labels-idx1-ubyte", np.zeros((20, 1)), "2 dimensions, expected 1"),
    ],
)
def test_files_that_do_not_belong_together_are_an_error(folder, name, array, says):
    (folder / name).write_bytes(idx_bytes(array))
    with pytest.raises(DataError, match=says):
        Digits.load(str(folder))


def test_an_empty_data_set_is_an_error(folder):
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((0, 5, 5))))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(0)))
    with pytest.raises(DataError, match="no images"):
        Digits.load(str(folder))


def test_an_unknown_name_lists_the_names():
    with pytest.raises(DataError, match=r"mnist-10k, mnist, fashion-mnist"):
        Digits.load("mnits")


def test_fashion_mnist_is_found_where_debian_puts_it(folder, monkeypatch):
    monkeypatch.setattr(digits, "_DEBIAN_FASHION_MNIST", folder)
    assert len(Digits.load("fashion-mnist").train_images) == 70


def test_mnist_goes_through_torchvision(tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="torchvision is an extra")
    monkeypatch.setattr(digits, "_DOWNLOADS", tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in FILES.items():
        (raw / name).write_bytes(idx_bytes(array))
    data = Digits.load("mnist")
    assert torch.equal(data.train_images, torch.from_numpy(FILES["train-images-idx3-ubyte"]).byte())
    assert len(data.test_labels) == 20
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(DataError, match="torchvision could not load MNIST"):
        Digits.load("mnist")
