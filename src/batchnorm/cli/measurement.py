"""The run of a `batchnorm bench` command, from its options to the page of results."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from batchnorm.cli.terminal import Failure, as_failure, command_line, from_options, new_folder, show, words
from batchnorm.requirements import install_command

if TYPE_CHECKING:
    from batchnorm.bench.options import Options
    from batchnorm.bench.rows import Command

# The default duration of a row in seconds; a command takes a few minutes.
_ROW_SECONDS = {
    "kernels": 5.0,
    "step": 20.0,
    "memory": 30.0,
    "infer": 2.5,
    "fold": 5.0,
    "statistics": 5.0,
    "scaling": 60.0,
}


def run(
    commands: tuple[Command, ...], out: Path | None, threads: int | None, *, quick: bool, **chosen: Any
) -> None:
    """Measure the commands one after the other; the results of each are written before the next begins."""
    import torch
    from rich.console import Console

    from batchnorm.bench import results, table
    from batchnorm.bench.display import Display
    from batchnorm.bench.measure import measure
    from batchnorm.bench.rows import ResultsError

    if threads is not None:
        torch.set_num_threads(threads)
    folder = out or new_folder("bench")
    console = Console()
    with as_failure(ResultsError, OSError), Display(console) as display:
        for command in commands:
            options = _options(command, quick, chosen)
            measured = measure(command, options, command_line(), display)
            page = results.write(measured, folder)
            for grid in table.grids(measured):
                console.print(table.render(grid), "")
            for note in measured.notes:
                show(console, note)
            if not measured.finished:
                show(console, f"Stopped. Results so far:  {page}")
                raise typer.Exit(130)
    console.print(table.NOTE, style="dim")
    for command in commands:
        if command in table.FOOTNOTES:
            console.print(table.FOOTNOTES[command], style="dim")
    show(console, f"\nresults  {page}")


def _options(command: Command, quick: bool, chosen: dict[str, Any]) -> Options:
    """The options of one command; those that are None take their defaults."""
    from batchnorm.bench.options import FOLDED, LARGE, NETWORKS, Options

    values = {name: value for name, value in chosen.items() if value is not None}
    for name in {"dtypes", "networks", "batches"} & values.keys():
        values[name] = words(values[name])
    if command in ("kernels", "scaling"):
        values.pop("networks", None)
    elif command == "fold":
        values.setdefault("networks", FOLDED[:1] if quick else FOLDED)
        values.setdefault("size", 224)
    elif command == "memory":
        values.setdefault("networks", ("resnet18",) if quick else LARGE)
        values.setdefault("size", 96)
    elif command == "statistics":
        values.setdefault("networks", ("resnet18",) if find_spec("torchvision") else ())
    else:
        values.setdefault("networks", ("mlp", "resnet18") if quick else tuple(NETWORKS))
    known = {"fold": FOLDED, "memory": LARGE}.get(command, tuple(NETWORKS))
    unknown = set(values.get("networks", ())) - set(known)
    if unknown:
        raise Failure(f"no network {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    if set(values.get("networks", ())) - {"mlp"} and not find_spec("torchvision"):
        raise Failure(f"the networks are torchvision's: {install_command('train')}, or --networks mlp")
    if quick:
        values = (
            {"seconds": 0.0} | values | {"least": 3, "size": 32, "batch": 2, "batches": (1, 2), "quick": True}
        )
    if values.get("device") == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise Failure("--device cuda: torch finds no CUDA GPU here")
    values.setdefault("seconds", _ROW_SECONDS[command])
    return from_options(Options, values)
