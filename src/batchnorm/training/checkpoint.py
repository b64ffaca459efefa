"""Checkpoints that are whole or not there: written beside, forced to the disk, then renamed."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(Exception):
    """A checkpoint that cannot be continued from; the message says which and what to do."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state`, tensors and plain values, replacing what was at `path` in one step.

    Raises: OSError when it cannot be written; then what was at `path` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    content = io.BytesIO()  # torch would turn a full disk into a RuntimeError of its own
    torch.save(state, content)
    try:
        with unfinished.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)  # on a full disk it would stand in the way of the next one
        raise
    _force_names(path.parent)


def load(path: Path) -> dict[str, Any] | None:
    """The state at `path`, or None if nothing was saved there. Loads data, never code.

    Raises: CheckpointError when the file is not what `save` wrote, down to the last bit.
    """
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None  # torch does not look at the checksums
        state = torch.load(path, weights_only=True, map_location="cpu") if whole else None
    except Exception:  # an unpickler that is fed noise raises anything
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"the checkpoint {path} is broken: delete it to go on from the one before, or else from the start"
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
        remains = self.folder.glob("step-*.unfinished")  # of a run that was killed
        for old in [*self.paths()[: -self.keep], *remains]:
            old.unlink(missing_ok=True)
        return path

    def paths(self) -> list[Path]:
        """All of them, the oldest first."""
        named = [path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d+", path.stem)]
        return sorted(named, key=lambda path: int(path.stem.removeprefix("step-")))

    @property
    def newest(self) -> Path | None:
        """Where a run goes on; None before the first."""
        return paths[-1] if (paths := self.paths()) else None


def _force_names(folder: Path) -> None:
    """A file's new name survives a power cut only when its folder is on the disk too."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
