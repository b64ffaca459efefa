"""Checkpoints, written atomically: to a temporary file, which is synced to the disk and then renamed.

A file is a ZIP archive of torch.save whose comment is the SHA-256 of all bytes before it: the archive's own checksums
leave out its directory and padding, and torch.load verifies none of them. torch.load reads it as any other.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from batchnorm.atomic_file import replacing

_LABEL = b"sha256="
_COMMENT = len(_LABEL) + 2 * hashlib.sha256().digest_size


class CheckpointError(Exception):
    """A checkpoint that cannot be resumed from; the message says which and what to do."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state`, tensors and plain values, to `path`, atomically replacing an earlier file.

    Raises: OSError when it cannot be written; then an earlier file at `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # torch.save to a full disk would raise RuntimeError instead of OSError
    torch.save(state, content)
    content.seek(-2, os.SEEK_END)
    content.write(_COMMENT.to_bytes(2, "little"))
    content.write(_comment(content.getbuffer()))
    with replacing(path, path.with_suffix(".unfinished")) as unfinished:
        unfinished.write_bytes(content.getbuffer())


def load(path: Path) -> dict[str, Any] | None:
    """The state at `path`, or None if there is no such file. Loads data, never code (weights_only=True).

    Raises: CheckpointError when it is not exactly what `save` wrote, or no file but a pipe or a device.
    """
    if not path.exists():
        return None
    state = None
    if path.is_file():  # a pipe or a device has no end that could be waited for
        with suppress(Exception):  # on corrupt data the unpickler may raise any
            state = _read(path)
    if not isinstance(state, dict):
        raise CheckpointError(
            f"the checkpoint {path} is broken: delete it to resume from the previous one, or else from the start"
        )
    return state


def _read(path: Path) -> object:
    """What `save`, or torch.save by itself, wrote; None if the file holds something else.

    Takes memory for the file, whatever it holds.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):  # a large file of another kind is not read at all
            return None
        file.seek(0)
        content = file.read()
    whole, comment = memoryview(content)[:-_COMMENT], content[-_COMMENT:]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if any(each.compress_type != zipfile.ZIP_STORED or each.external_attr for each in members):
            return None  # a compressed member may be larger than memory, and a folder has no content
        signed = not content.endswith(bytes(2))  # the length of an archive's comment, where it has none
        if comment != _comment(whole) if signed else archive.testzip() is not None:
            return None
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def _comment(content: memoryview) -> bytes:
    return _LABEL + hashlib.sha256(content).hexdigest().encode()


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
