"""Checkpoints, written atomically: to a temporary file, which is synced to the disk and then renamed."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(Exception):
    """A checkpoint that cannot be resumed from; the message says which and what to do."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state`, tensors and plain values, to `path`, atomically replacing an earlier file.

    Raises: OSError when it cannot be written; then an earlier file at `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    content = io.BytesIO()  # torch.save to a full disk would raise RuntimeError instead of OSError
    torch.save(state, content)
    try:
        with unfinished.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)  # frees the space on a full disk
        raise
    _sync_folder(path.parent)


def load(path: Path) -> dict[str, Any] | None:
    """The state at `path`, or None if there is no such file. Loads data, never code (weights_only=True).

    Raises: CheckpointError when the file's checksums are wrong or it is not a file of `save`.
    """
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None  # torch.load does not verify the checksums
        state = torch.load(path, weights_only=True, map_location="cpu") if whole else None
    except Exception:  # on corrupt data the unpickler may raise any exception
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"the checkpoint {path} is broken: delete it to resume from the previous one, or else from the start"
        )
    return state


class Checkpoints:
    """The checkpoints of one run in a folder, `step-NUMBER.pt`, of which the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write the state after `step` steps; then delete what is older than the newest `keep`."""
        path = self.folder / f"step-{step:09}.pt"
        save(state, path)
        unfinished = self.folder.glob("step-*.unfinished")  # left by a run that was killed
        for old in [*self.paths()[: -self.keep], *unfinished]:
            old.unlink(missing_ok=True)
        return path

    def paths(self) -> list[Path]:
        """All of them, the oldest first."""
        paths = [path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d+", path.stem)]
        return sorted(paths, key=lambda path: int(path.stem.removeprefix("step-")))

    @property
    def newest(self) -> Path | None:
        """The checkpoint to resume from; None if there is none."""
        return paths[-1] if (paths := self.paths()) else None


def _sync_folder(folder: Path) -> None:
    """Write the folder to the disk, without which a rename may not survive a power failure."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
