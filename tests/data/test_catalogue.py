"""Each kind of data set by name or folder, both splits, and what is said when it is not there."""

import hashlib
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch

from batchnorm.data import catalogue as module
from batchnorm.data.catalogue import load
from batchnorm.data.digits import Digits
from batchnorm.data.idx import DataError
from batchnorm.data.names import Names
from batchnorm.data.source import Unreadable
from tests.data.pictures import encoded, image_folder, picture
from tests.data.test_idx import idx_bytes


def test_the_shipped_digits():
    train, val = load("mnist-10k", "train"), load("mnist-10k", "val")
    digits = Digits.load()
    assert (len(train), len(val)) == (8000, 2000)
    assert (train.classes, train.channels, train.shards) == (10, 1, None)
    image, label = train[17]
    assert torch.equal(image, digits.train_images[17:18])
    assert (type(label), label) == (int, int(digits.train_labels[17]))
    assert torch.equal(val[5][0], digits.test_images[5:6])
    assert val.name(5) == "mnist-10k val[5]"


def test_a_folder_of_idx_files(tmp_path):
    for name, count in (("train", 30), ("t10k", 20)):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx_bytes(np.ones((count, 5, 6))))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count) % 7))
    val = load(str(tmp_path), "val")
    assert (len(val), val.classes, val[9][0].shape, val[9][1]) == (20, 7, (1, 5, 6), 2)


def test_cifar_10_goes_through_torchvision(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is an extra")
    monkeypatch.setattr(module, "_DOWNLOADS", tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def put(name, content):
        pickled = pickle.dumps(content)
        (folder / name).write_bytes(pickled)
        return [name, hashlib.md5(pickled).hexdigest()]

    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
    lists = {
        "train_list": [put("data_batch_1", {"data": pixels, "labels": [3, 9, 0, 1]})],
        "test_list": [put("test_batch", {"data": pixels[:2], "labels": [8, 7]})],
        "meta": dict(
            zip(("filename", "md5"), put("batches.meta", {"label_names": list("abcdefghij")}), strict=True)
        ),
    }
    for name, value in lists.items():
        value = {**value, "key": "label_names"} if isinstance(value, dict) else value
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    train = load("cifar-10", "train")
    assert (len(train), train.classes, train.channels) == (4, 10, 3)
    image, label = train[1]
    assert label == 9
    np.testing.assert_array_equal(image, pixels[1].reshape(3, 32, 32))
    assert load("cifar-10", "val")[1][1] == 7
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "nowhere").as_uri())
    (folder / "test_batch").write_bytes(b"")
    with pytest.raises(DataError, match=r"^torchvision could not load cifar-10 from [^\n]*unpack[^\n]*$"):
        load("cifar-10", "val")


def test_without_torchvision_files_and_cifar_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match=r"cifar-10 need torchvision.*.*pip install .*'torchvision>="):
        load("cifar-10", "train")
    monkeypatch.setitem(sys.modules, "batchnorm.data.folder", None)
    with pytest.raises(DataError, match="images in files need torchvision"):
        load(str(image_folder(tmp_path)), "train")


def test_a_folder_in_imagenets_layout(tmp_path):
    root = image_folder(tmp_path)
    (root / "train" / "dog" / "more").mkdir()
    (root / "train" / "dog" / "more" / "gréy.PNG").write_bytes(encoded(picture(5, "L"), "PNG"))
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    train, val = load(str(root), "train"), load(str(root), "val")
    assert (len(train), len(val), train.classes, val.classes, train.shards) == (13, 6, 2, 2, None)
    assert [train[index][1] for index in range(13)] == [0] * 6 + [1] * 7
    assert train.name(12) == str(root / "train" / "dog" / "more" / "gréy.PNG")
    assert train[12][0].shape == (3, 12, 10)
    assert val.name(0) == str(root / "val" / "cat" / "00.jpg")
    copy = pickle.loads(pickle.dumps(train))
    assert torch.equal(copy[3][0], train[3][0])


def test_agrees_with_torchvisions_image_folder(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is an extra")
    ours, theirs = load(str(image_folder(tmp_path)), "train"), datasets.ImageFolder(tmp_path / "train")
    assert len(ours) == len(theirs)
    for index, (image, label) in enumerate(theirs):
        assert ours[index][1] == label
        np.testing.assert_array_equal(ours[index][0].permute(1, 2, 0), np.asarray(image))


def test_a_file_that_is_broken_or_gone_is_unreadable(tmp_path):
    source = load(str(image_folder(tmp_path)), "train")
    (tmp_path / "train" / "cat" / "01.jpg").write_bytes(b"")
    (tmp_path / "train" / "cat" / "02.jpg").unlink()
    for index, why in ((1, "cannot identify"), (2, "No such file")):
        with pytest.raises(Unreadable, match=rf"cat/0{index}\.jpg: .*{why}"):
            source[index]


def test_validation_classes_must_be_the_training_classes(tmp_path):
    root = image_folder(tmp_path)
    (root / "val" / "dog").rename(root / "val" / "dogs")
    with pytest.raises(DataError, match=r"same classes, but dog only in train, dogs only in val$"):
        load(str(root), "val")
    for number in range(9):
        (root / "val" / f"z{number}").mkdir()
    with pytest.raises(DataError, match=r"z2 only in val and 6 more$"):
        load(str(root), "val")


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("val", "has no folder val: images are looked for in val/CLASS"),
        ("train", "has no folder train"),
        ("val/dog", "same classes, but dog only in train"),
        ("val/dog/*", "no valid file for the classes dog"),
    ],
)
def test_what_is_missing_from_a_folder_of_images_is_named(tmp_path, missing, says):
    root = image_folder(tmp_path)
    for path in list(root.glob(missing)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=says):
        load(str(root), "val")


def test_images_outside_class_folders_are_not_found(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jpg").write_bytes(encoded(picture(0)))
    with pytest.raises(DataError, match="train has no folders: each class needs one"):
        load(str(tmp_path), "train")


def test_an_empty_folder_and_an_unknown_name_say_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no train/CLASS/ with images, no train-\*\.tar and no train-images"):
        load(str(tmp_path), "train")
    with pytest.raises(
        DataError, match=r"no data set 'mnits': name a folder .*, or one of mnist-10k, .*, cifar-10"
    ):
        load("mnits", "train")


def test_names_come_back_whatever_bytes_they_have():
    written = ["a", "", "dé/ü.jpg", os.fsdecode(b"latin-\xe9.jpg"), "two\nlines"]
    names = pickle.loads(pickle.dumps(Names(written)))
    assert [names[index] for index in range(len(names))] == written
    assert len(Names([])) == 0
