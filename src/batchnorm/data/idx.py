"""IDX, the file format of MNIST: a magic number, the sizes, then the bytes; possibly gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

_UBYTE = 0x08  # the element type of images and labels
_GZIP = b"\x1f\x8b"
_INFLATED = 1032  # bytes at most that a byte of gzip holds


class DataError(Exception):
    """A data set that is missing or broken; the message says which file, what is wrong and what to do."""


def read(path: Path) -> Tensor:
    """The array in an IDX file of unsigned bytes: a uint8 tensor of the sizes in its header.

    The header is read first, and then no more than it declares.

    Raises: DataError when the file is missing, truncated, longer than its header says, or not an IDX file.
    """
    try:
        size = _size(path)
        with path.open("rb") as file:
            zipped = file.read(2) == _GZIP  # by content, as files may lose their .gz
            file.seek(0)
            if not zipped:
                return _array(path, file, size)
            with gzip.open(file) as content:
                return _array(path, content, None, at_most=size * _INFLATED)
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise _torn(path, error) from None
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (EOFError, zlib.error) as error:
        raise _torn(path, error) from None


def _size(path: Path) -> int:
    """The bytes of a file on a disk; a pipe or a device has no end that could be waited for."""
    status = path.stat()
    if not path.is_file() and not path.is_dir():
        raise DataError(f"cannot read {path}: it is no file, but a pipe or a device")
    return status.st_size


def _array(
    path: Path, file: IO[bytes] | gzip.GzipFile, size: int | None, at_most: float = math.inf
) -> Tensor:
    """The array in `file`, of `size` bytes if that is known, else of no more than `at_most`."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UBYTE or not 1 <= magic[3] <= 4:
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes: its magic number is "
            f"{magic.hex(' ') or 'missing'}, not 00 00 08 and the number of dimensions"
        )
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"{path} is torn: it ends within its header; fetch it again")
    sizes = [int.from_bytes(header[at : at + 4], "big") for at in range(0, len(header), 4)]
    before, values = len(magic) + len(header), math.prod(sizes)
    if size is None and before + values <= at_most:
        content = file.read(values + 1)
        size = before + len(content)
    elif size == before + values:
        content = file.read(values)
    if size != before + values:
        found = f"it has {size:,}" if size is not None else f"it cannot have more than {at_most:,.0f}"
        if at_most < math.inf and size == before + values + 1:  # read no further
            found = "it has more"
        torn = size is None or size < before + values
        raise DataError(
            f"{path} is {'torn; fetch it again' if torn else 'not what its header says'}: "
            f"{' × '.join(map(str, sizes))} values and a header are {before + values:,} bytes, {found}"
        )
    if not values:
        return torch.empty(sizes, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(sizes)


def _torn(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is torn, its gzip stream is broken ({error}); fetch it again")
