"""Checkpoints that are whole or not there: written beside, forced to the disk, then renamed."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch


class CheckpointError(Exception):
    """A checkpoint that cannot be continued from; the message says which and what to do."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state`, tensors and plain values, replacing what was at `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    content = io.BytesIO()  # torch would turn a full disk into a RuntimeError of its own
    torch.save(state, content)
    with unfinished.open("wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load(path: Path) -> dict[str, Any] | None:
    """The state at `path`, or None if nothing was saved there. Loads data, never code.

    Raises: CheckpointError when the file is not what `save` wrote.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception:  # an unpickler that is fed noise raises anything
        raise CheckpointError(
            f"the checkpoint {path} is broken: delete it to train that network from its start"
        ) from None
    return state
