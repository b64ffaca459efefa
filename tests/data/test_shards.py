"""Shards read by offset give what webdataset reads from them in sequence; a torn or changed one is an error."""

import gzip
import io
import json
import os
import pickle
import tarfile

import pytest
import torch

pytest.importorskip("PIL", reason="images come with the extra")
pytest.importorskip("webdataset", reason="the oracle of these tests")

import webdataset

from batchnorm.data import shards
from batchnorm.data.catalogue import load
from batchnorm.data.idx import DataError
from batchnorm.data.images import decode
from batchnorm.data.shards import Index, Shards
from batchnorm.data.source import Unreadable
from tests.data.pictures import encoded, picture

COUNTS = {"train-0": 5, "train-1": 3, "val-0": 4}


def sample(number, label=None):
    return {
        "__key__": f"{number:06}",
        "jpg": encoded(picture(number)),
        "cls": number % 3 if label is None else label,
    }


def write(path, samples):
    with webdataset.TarWriter(str(path)) as tar:
        for each in samples:
            tar.write(each)


def read(path):
    """The samples of a shard; not by webdataset.WebDataset, which leaves its files open."""
    with path.open("rb") as stream:
        files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        return list(webdataset.tariterators.group_by_keys(files))


@pytest.fixture
def folder(tmp_path):
    first = 0
    for name, count in COUNTS.items():
        write(tmp_path / f"{name}.tar", [sample(number) for number in range(first, first + count)])
        first += count
    return tmp_path


def test_reads_what_webdataset_reads(folder):
    source = load(str(folder), "train")
    expected = [*read(folder / "train-0.tar"), *read(folder / "train-1.tar")]
    assert len(source) == len(expected) == 8
    for index, theirs in enumerate(expected):
        image, label = source[index]
        assert torch.equal(image, decode(theirs["jpg"], "theirs"))
        assert label == int(theirs["cls"])
        assert source.name(index) == f"{theirs['__url__']}: {theirs['__key__']}"
    assert (source.shards, source.classes, source.channels) == ((5, 3), 3, 3)


def test_odd_samples_are_grouped_as_webdataset_groups_them(tmp_path):
    jpeg = encoded(picture(0))
    members = [
        ("__meta__/about.json", b"skipped"),
        ("._a.jpg", b"skipped"),
        ("set.v1/a.JPG", jpeg),
        ("set.v1/a.mask.png", b"not the image"),
        ("set.v1/a.json", b'{"label": 4}'),
        ("no ending", b"skipped"),
        ("set.v1/b.cls", b"2\n"),
        ("set.v1/b.jpeg", jpeg),
        ("set.v1/a.png", encoded(picture(1), "PNG")),
        ("set.v1/a.cls", b"0"),
    ]
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        entry = tarfile.TarInfo("set.v1")
        entry.type = tarfile.DIRTYPE
        tar.addfile(entry)
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    keys = [each["__key__"] for each in read(tmp_path / "train-0.tar")]
    source = load(str(tmp_path), "train")
    assert (
        [source.name(index).split(": ")[1] for index in range(3)]
        == keys
        == ["set.v1/a", "set.v1/b", "set.v1/a"]
    )
    assert [source[index][1] for index in range(3)] == [4, 2, 0]
    assert torch.equal(source[2][0], decode(encoded(picture(1), "PNG"), "a"))
    assert source.classes == 5


def test_long_names_and_other_formats_of_tar(tmp_path):
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        key = "deep/" * 20 + ("é" if format != tarfile.USTAR_FORMAT else "e") * 60
        with tarfile.open(tmp_path / "train-0.tar", "w", format=format) as tar:
            for name, content in ((f"{key}.jpg", encoded(picture(7))), (f"{key}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        source = load(str(tmp_path), "train")
        assert source.name(0).endswith(f": {key}")
        assert torch.equal(source[0][0], decode(encoded(picture(7)), "a"))


def test_a_pattern_names_shards_of_any_name(folder):
    for name in COUNTS:
        (folder / f"{name}.tar").rename(folder / f"imagenet-{name.replace('val', 'validation')}.tar")
    pattern = str(folder / "imagenet-{train,validation}-*.tar")
    assert (len(load(pattern, "train")), len(load(pattern, "val"))) == (8, 4)
    with pytest.raises(DataError, match=r"does not tell the splits apart: write \{train,val\}"):
        load(str(folder / "imagenet-*.tar"), "train")
    with pytest.raises(DataError, match=r"no val shards: nothing matches .*imagenet-test-\*\.tar"):
        load(str(folder / "imagenet-{train,test}-*.tar"), "val")


def test_classes_are_counted_over_the_training_shards_or_listed(folder):
    write(folder / "val-0.tar", [sample(0, label=0)])
    assert load(str(folder), "val").classes == 3
    (folder / "classes.txt").write_text("a cat\na dog\na bird\nanother\n")
    assert load(str(folder), "train").classes == load(str(folder), "val").classes == 4
    (folder / "classes.txt").write_text("a cat\na dog\n")
    with pytest.raises(DataError, match=r"train-0\.tar: 000002 is of class 2, but there are 2 classes"):
        load(str(folder), "train")


def test_a_validation_class_that_training_lacks_is_an_error(folder):
    write(folder / "val-0.tar", [sample(0, label=3)])
    with pytest.raises(DataError, match=r"val-0\.tar: 000000 is of class 3"):
        load(str(folder), "val")


def test_the_index_is_kept_beside_the_shard_while_it_fits(folder, monkeypatch):
    load(str(folder), "train")
    stored = folder / "train-0.tar.index"
    before = stored.read_bytes()

    def scan(*_):
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", scan)
        assert len(load(str(folder), "train")) == 8
    assert stored.read_bytes() == before
    assert len(list(folder.iterdir())) == 5  # no drafts left behind


@pytest.mark.parametrize("change", ["content", "time", "torn index", "other version"])
def test_an_index_that_does_not_fit_is_made_anew(folder, change):
    load(str(folder), "train")
    shard, stored = folder / "train-1.tar", folder / "train-1.tar.index"
    made = json.loads(stored.read_bytes())
    if change == "content":
        write(shard, [sample(number, label=number) for number in range(2)])
        os.utime(shard, ns=(made["modified"], made["modified"]))
    elif change == "time":
        size = shard.stat().st_size
        write(shard, [sample(number, label=1) for number in (5, 6, 7)])
        assert shard.stat().st_size == size
    elif change == "torn index":
        stored.write_bytes(stored.read_bytes()[:-9])
    else:
        stored.write_text(json.dumps({**made, "version": 2, "labels": [0, 0, 0]}))
    labels = {"content": [0, 1], "time": [1, 1, 1]}.get(change, [2, 0, 1])
    source = load(str(folder), "train")
    assert [source[index][1] for index in range(5, len(source))] == labels
    assert json.loads(stored.read_bytes())["labels"] == labels


def test_where_no_index_can_be_written_it_is_scanned_again(folder, monkeypatch):
    for name in COUNTS:  # a folder in its place: nobody, not even root, can write or read it
        (folder / f"{name}.tar.index").mkdir()
    assert len(load(str(folder), "train")) == 8
    assert len(list(folder.iterdir())) == 6


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1024, 1536, 3000, "all but the end mark"])
def test_a_shard_torn_anywhere_is_an_error_that_names_it(folder, keep):
    shard = folder / "train-1.tar"
    whole = shard.read_bytes()
    end = whole.rstrip(b"\0")  # the last label, and whatever pads it to a block
    shard.write_bytes(whole[: keep if keep != "all but the end mark" else len(end) // 512 * 512 + 512])
    with pytest.raises(DataError, match=r"train-1\.tar is torn"):
        load(str(folder), "train")
    assert not (folder / "train-1.tar.index").exists()


@pytest.mark.parametrize("pack", [gzip.compress, lambda content: b"text" * 500])
def test_what_is_no_plain_tar_is_an_error(folder, pack):
    shard = folder / "train-1.tar"
    shard.write_bytes(pack(shard.read_bytes()))
    with pytest.raises(DataError, match=r"train-1\.tar is torn, or no plain tar file"):
        load(str(folder), "train")


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"cls": 1}, "000000 has no image"),
        ({"jpg": b""}, "000000 has no class"),
        ({"jpg": b"", "cls": "cat"}, "000000 has no class, a number from 0"),
        ({"jpg": b"", "cls": -1}, "000000 has no class"),
        ({"jpg": b"", "json": {"caption": "a cat"}}, "000000 has no class"),
        ({"jpg": b"", "json": [1]}, "000000 has no class"),
    ],
)
def test_a_sample_that_lacks_something_is_an_error(folder, members, says):
    write(folder / "train-1.tar", [{"__key__": "000000", **members}])
    with pytest.raises(DataError, match=rf"train-1\.tar: {says}"):
        load(str(folder), "train")


def test_neighbours_of_one_name_are_an_error(folder):
    write(folder / "train-1.tar", [sample(1), sample(1)])
    with pytest.raises(DataError, match=r"train-1\.tar has two neighbours named 000001\.cls"):
        load(str(folder), "train")


def test_shards_without_samples_are_an_error_and_one_among_others_is_not(folder):
    write(folder / "train-1.tar", [])
    assert load(str(folder), "train").shards == (5, 0)
    write(folder / "train-0.tar", [])
    with pytest.raises(DataError, match="hold no samples"):
        load(str(folder), "train")


def test_a_broken_image_is_unreadable_and_its_neighbours_are_not(folder):
    write(folder / "train-1.tar", [sample(0), {"__key__": "bad", "jpg": b"", "cls": 0}, sample(2)])
    source = load(str(folder), "train")
    with pytest.raises(Unreadable, match=r"train-1\.tar: bad: "):
        source[6]
    assert source[7][1] == 2


def test_a_shard_that_is_gone_changed_or_cut_is_an_error(folder):
    source, shard = load(str(folder), "train"), folder / "train-1.tar"
    assert source[5][1] == 2
    with shard.open("r+b") as file:
        file.truncate(600)
    with pytest.raises(DataError, match=r"train-1\.tar was cut short"):
        source[7]
    with pytest.raises(DataError, match=r"train-1\.tar has changed"):
        pickle.loads(pickle.dumps(source))[7]
    shard.unlink()
    with pytest.raises(DataError, match=r"cannot read .*train-1\.tar: No such file"):
        pickle.loads(pickle.dumps(source))[7]
    (folder / "train-0.tar").unlink()
    with pytest.raises(DataError, match=r"no train shards: nothing matches .*train-\*\.tar"):
        load(str(folder), "train")


def test_few_files_are_open_and_none_in_a_pickle(folder, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 1)
    before = len(os.listdir("/proc/self/fd"))
    source = load(str(folder), "train")
    for index in (0, 7, 1, 6):
        source[index]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    copy = pickle.loads(pickle.dumps(source))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert torch.equal(copy[6][0], source[6][0])
    del source, copy
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_index_says_where_an_image_lies(folder):
    index = Index.of(folder / "val-0.tar")
    content = (folder / "val-0.tar").read_bytes()
    start, size = index.offsets[2], index.sizes[2]
    assert content[start : start + size] == sample(10)["jpg"]
    assert Shards([folder / "val-0.tar"], [index], 3).name(2).endswith("000010")
