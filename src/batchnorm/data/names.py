"""A compact list of strings in shared memory, for data sets with millions of files."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch


class Names:
    """Strings by index, concatenated in one tensor, which torch shares between processes when it is pickled."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        # the extra byte is for frombuffer, which refuses an empty buffer
        self._bytes = torch.frombuffer(bytearray(b"".join((*encoded, b"\n"))), dtype=torch.uint8)
        self._ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(self._bytes[start:end].numpy().tobytes())
