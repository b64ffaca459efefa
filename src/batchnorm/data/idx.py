"""IDX, the file format of MNIST: a magic number, the sizes, then the bytes; possibly gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

_UBYTE = 0x08  # the element type of images and labels


class DataError(Exception):
    """A data set that is missing or broken; the message says which file, what is wrong and what to do."""


def read(path: Path) -> Tensor:
    """The array in an IDX file of unsigned bytes: a uint8 tensor of the sizes in its header.

    Raises: DataError when the file is missing, truncated, longer than its header says, or not an IDX file.
    """
    content = _bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UBYTE or not 1 <= content[3] <= 4:
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes: its magic number is "
            f"{content[:4].hex(' ') or 'missing'}, not 00 00 08 and the number of dimensions"
        )
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"{path} is torn: it ends within its header; fetch it again")
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    expected = header + math.prod(sizes)
    if len(content) != expected:
        torn = "torn; fetch it again" if len(content) < expected else "not what its header says"
        raise DataError(
            f"{path} is {torn}: {' × '.join(map(str, sizes))} values and a header are {expected:,} bytes, "
            f"it has {len(content):,}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].reshape(sizes)


def _bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if content[:2] != b"\x1f\x8b":  # by content, as files may lose their .gz
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is torn, its gzip stream is broken ({error}); fetch it again") from None
