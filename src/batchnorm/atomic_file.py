"""Write files so that at a path there is the whole of an old file or of the new one, whatever stops the program."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, unfinished: Path | None = None) -> Iterator[Path]:
    """Yields `unfinished`, in the folder of `path`, to write to; when the block ends, it is at `path`, on the disk.

    unfinished: None: a hidden file of the same suffix.

    If the block raises, `path` is as it was, and `unfinished` is gone: on a full disk its space is needed.
    """
    unfinished = unfinished or path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Write the folder to the disk, without which a rename may not survive a power failure."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
