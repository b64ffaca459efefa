"""Files of weights that a command writes: FILE.safetensors, or FILE.pt."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchnorm.cli.terminal import Failure, as_failure

if TYPE_CHECKING:
    from torch import Tensor

OutOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the weights there: FILE.safetensors, or FILE.pt.",
        show_default="nothing is written",
    ),
]


def check(out: Path | None) -> None:
    """Before anything is computed. Raises: Failure for a name or folder that cannot be written to."""
    if out is None:
        return
    if out.suffix not in (".safetensors", ".pt", ".pth"):
        raise Failure(f"--out {out}: the name must end in .safetensors, .pt or .pth")
    if not out.parent.is_dir():
        raise Failure(f"--out {out}: there is no folder {out.parent}: make it first")


def write(state: Mapping[str, Tensor], out: Path) -> None:
    """Write a state_dict, so that the whole file is there or the one that was. Raises: Failure."""
    from batchnorm.atomic_file import replacing
    from batchnorm.passes.export import as_safetensors

    with as_failure(OSError), replacing(out) as file:
        file.write_bytes((as_safetensors if out.suffix == ".safetensors" else _by_torch)(dict(state)))


def size(out: Path) -> str:
    """A line that says what was written."""
    return f"{out}: {out.stat().st_size / 1e6:,.1f} MB"


def _by_torch(state: dict[str, Tensor]) -> bytes:
    import torch

    content = io.BytesIO()  # to a full disk torch.save would raise RuntimeError instead of OSError
    torch.save(state, content)
    return content.getvalue()
