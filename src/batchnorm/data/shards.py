"""WebDataset shards: tar files in which consecutive members with one key, 000123.jpg and 000123.cls, are a sample."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from batchnorm.data.idx import DataError
from batchnorm.data.images import decode
from batchnorm.data.names import Names
from batchnorm.data.source import Split, Unreadable

_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff")
_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # the key ends at the first dot of the file's name
_METADATA = re.compile(r"__[^/]*__($|/)")
_SPLITS = re.compile(r"\{([^{},]*),([^{},]*)\}")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # by which tarfile stands for bytes that are not UTF-8
_BLOCK = 512
_OPEN_FILES = 16
_LABELS = 1_000_000  # one more than the largest label
_LABEL_FILE = 2**20  # bytes; a .json may hold more than the label
_SCANS = 8  # concurrent scans; on a network file system a scan mostly waits for I/O


class Index(BaseModel):
    """The contents of a shard, with one list entry per sample.

    length, modified: size in bytes and modification time in ns of the tar file when it was scanned.
    keys: from the names of the members.
    offsets, sizes: of the image files within the tar file, in bytes.
    labels: classes, from 0.
    """

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    length: int
    modified: int
    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]

    @model_validator(mode="after")
    def _possible(self) -> Self:
        """An index that says where things are that cannot be there would be followed to read them."""
        samples = len(self.keys)
        if not samples == len(self.offsets) == len(self.sizes) == len(self.labels):
            raise ValueError("lists of unequal lengths")
        places = zip(self.offsets, self.sizes, strict=True)
        if not all(
            offset >= _BLOCK and size >= 0 and offset + size <= self.length for offset, size in places
        ):
            raise ValueError("an image outside of the shard")
        if not all(0 <= label < _LABELS for label in self.labels):
            raise ValueError("a label that no class has")
        return self

    @property
    def stamp(self) -> tuple[int, int]:
        return self.length, self.modified

    @classmethod
    def of(cls, shard: Path) -> Self:
        """The index of `shard`: read from SHARD.index if that is up to date, else scanned and stored there.

        Raises: DataError for a shard that is missing, truncated, or has samples without an image or a label.
        """
        stored = shard.with_name(f"{shard.name}.index")
        try:
            stamp = _stamp(shard.stat())
            with shard.open("rb") as file:
                try:
                    if stored.is_file() and stored.stat().st_size <= stamp[0]:
                        index = cls.model_validate_json(stored.read_bytes())
                        if index.stamp == stamp:
                            return index
                except (OSError, ValidationError):
                    pass  # missing or broken: scan again
                index = cls._scan(shard, file, stamp)
        except OSError as error:
            raise DataError(f"cannot read {shard}: {error.strerror}") from None
        _store(index.model_dump_json(), stored)
        return index

    @classmethod
    def _scan(cls, shard: Path, file: IO[bytes], stamp: tuple[int, int]) -> Self:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                grouped = list(_group_by_key(shard, tar))
                file.seek(tar.offset)
                if file.read(_BLOCK) != bytes(_BLOCK):  # tarfile accepts a file truncated between members
                    raise tarfile.ReadError("it has no end mark")
                samples = [_sample(shard, tar, key, members) for key, members in grouped]
        except (tarfile.TarError, EOFError, MemoryError, OverflowError, ValueError) as error:
            raise DataError(f"{shard} is torn, or no plain tar file ({error}); fetch it again") from None
        keys, offsets, sizes, labels = map(list, zip(*samples, strict=True)) if samples else ([], [], [], [])
        for key, offset, size in zip(keys, offsets, sizes, strict=True):
            if offset + size > stamp[0]:  # a sparse member may claim any size
                raise DataError(f"{shard}: the image of {key} is beyond the end of the file; fetch it again")
        return cls(length=stamp[0], modified=stamp[1], keys=keys, offsets=offsets, sizes=sizes, labels=labels)


def _group_by_key(shard: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The key of each sample, and its members by extension."""
    files = (
        (match[1], match[2].lower(), member)
        for member in tar
        if member.isreg() and not _METADATA.match(member.name) and (match := _MEMBER.fullmatch(member.name))
    )
    for key, group in itertools.groupby(files, lambda file: file[0]):
        if _SURROGATE.search(key):
            raise DataError(f"{shard} has a member whose name is not UTF-8 text, {key!r}: rename it")
        members: dict[str, tarfile.TarInfo] = {}
        for _, ending, member in group:
            if ending in members:
                raise DataError(f"{shard} has two neighbours named {key}.{ending}: keys must differ")
            members[ending] = member
        yield key, members


def _sample(
    shard: Path, tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]
) -> tuple[str, int, int, int]:
    """(key, offset and size of the image in bytes, label)."""
    image = next((members[ending] for ending in _IMAGES if ending in members), None)
    if image is None:
        raise DataError(f"{shard}: {key} has no image; looked for {', '.join(_IMAGES)}")
    try:
        if "cls" in members:
            label = int(_content(tar, members["cls"]))
        else:
            label = int(json.loads(_content(tar, members["json"]))["label"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        label = -1
    if not 0 <= label < _LABELS:
        raise DataError(
            f"{shard}: {key} has no class, a number from 0 to {_LABELS - 1:,} in a .cls, or as label in a .json"
        )
    return key, image.offset_data, image.size, label


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Raises: ValueError for one that is too large to hold a label."""
    if member.size > _LABEL_FILE:
        raise ValueError("no label")
    file = tar.extractfile(member)
    assert file is not None  # it is a regular one
    with file:
        return file.read()


def _store(text: str, path: Path) -> None:
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")  # other processes may write it too
    try:
        draft.write_text(text)
        draft.replace(path)
    except OSError:  # the disk is full or read-only: the next run scans again
        draft.unlink(missing_ok=True)


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


class Shards:
    """The images of a split, in the order of the shards.

    paths, indices: the shard files, and the `Index` of each.
    classes: number of classes.
    class_names: of each; () for numbers.

    Raises: DataError for a label outside of the classes, or if there are no samples.
    """

    channels = 3

    def __init__(
        self, paths: Sequence[Path], indices: Sequence[Index], classes: int, class_names: tuple[str, ...] = ()
    ) -> None:
        self.classes, self.class_names = classes, class_names
        self.shards = tuple(len(index.keys) for index in indices)
        if not sum(self.shards):
            raise DataError(f"{paths[0]} and {len(paths) - 1} more shards hold no samples")
        for path, index in zip(paths, indices, strict=True):
            if (top := max(index.labels, default=0)) >= classes:
                key = index.keys[index.labels.index(top)]
                raise DataError(f"{path}: {key} is of class {top}, but there are {classes} classes, from 0")
        self._paths = tuple(paths)
        self._ends = tuple(itertools.accumulate(self.shards))
        self._keys = Names(key for index in indices for key in index.keys)
        self._offsets = torch.tensor([offset for index in indices for offset in index.offsets])
        self._sizes = torch.tensor([size for index in indices for size in index.sizes])
        self._labels = torch.tensor([label for index in indices for label in index.labels])
        self._files = _OpenFiles(self._paths, tuple(index.stamp for index in indices))

    @classmethod
    def load(cls, pattern: Path, split: Split) -> Shards:
        """The shards that match a pattern such as FOLDER/{train,val}-*.tar, whose braces name both splits.

        The number of classes is that of the lines of classes.txt beside the training shards; without that
        file, the largest training label plus one.

        Raises: DataError as `Index.of` and `Shards` do, and when no file matches.
        """
        train = _match_shards(pattern, "train")
        names = _class_names(train[0].parent)
        classes = len(names) or None
        if split == "train" or classes is None:
            indices = _read_indices(train)
        if classes is None:
            classes = 1 + max((max(index.labels, default=0) for index in indices), default=0)
        paths = train
        if split == "val":
            paths = _match_shards(pattern, "val")
            indices = _read_indices(paths)
        return cls(paths, indices, classes, names)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        size, label = int(self._sizes[index]), int(self._labels[index])
        shard = bisect_right(self._ends, index)
        file = self._files[shard]
        try:
            content = os.pread(file, size, int(self._offsets[index]))
        except OSError as error:
            raise Unreadable(self.name(index), f"{error.strerror}") from None
        if len(content) < size:
            raise DataError(f"{self._paths[shard]} was cut short while it was read; fetch it again")
        return decode(content, self.name(index)), label

    def name(self, index: int) -> str:
        return f"{self._paths[bisect_right(self._ends, index)]}: {self._keys[index]}"


def _match_shards(pattern: Path, split: Split) -> list[Path]:
    names = _SPLITS.search(str(pattern))
    if names is None:
        raise DataError(f"{pattern} does not tell the splits apart: write {{train,val}} where they differ")
    wanted = Path(_SPLITS.sub(names[1 if split == "train" else 2], str(pattern), count=1))
    found = sorted(wanted.parent.glob(wanted.name))
    if not found:
        raise DataError(f"no {split} shards: nothing matches {wanted}")
    return found


def _read_indices(paths: Sequence[Path]) -> list[Index]:
    with ThreadPoolExecutor(_SCANS) as pool:
        return list(pool.map(Index.of, paths))


def _class_names(folder: Path) -> tuple[str, ...]:
    """The lines of classes.txt, if there is one."""
    path = folder / "classes.txt"
    try:
        return tuple(path.read_text("utf-8-sig").strip().splitlines())
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: it has the name of a class in each line") from None
    except OSError:
        return ()


class _OpenFiles:
    """A cache of the file descriptors of the last shards read, bounded in each process and empty in a pickle."""

    def __init__(self, paths: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> None:
        self._paths, self._stamps = paths, stamps
        self._open: dict[int, int] = {}  # by shard, the most recently used last

    def __getitem__(self, shard: int) -> int:
        """Raises: DataError when the shard is missing, or has changed since it was scanned."""
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            descriptor = self._open_shard(shard)
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[shard] = descriptor
        return descriptor

    def _open_shard(self, shard: int) -> int:
        path = self._paths[shard]
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; the run needs every shard") from None
        if _stamp(os.fstat(descriptor)) != self._stamps[shard]:
            os.close(descriptor)
            raise DataError(f"{path} has changed since this run began: start it again")
        return descriptor

    def __reduce__(self) -> tuple[type[_OpenFiles], tuple[object, ...]]:
        return _OpenFiles, (self._paths, self._stamps)

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
