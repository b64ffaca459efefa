"""`batchnorm merge`: the running statistics of several files of weights, as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli import state_file
from batchnorm.cli.named_model import JsonOption
from batchnorm.cli.terminal import Failure, as_failure, one_of, show

if TYPE_CHECKING:
    from torch import Tensor

EPILOG = (
    "[bold]Examples[/]\n\n"
    "batchnorm merge a.safetensors b.safetensors --out merged.safetensors     of equal weight\n\n"
    "batchnorm merge a.pt:5000 b.pt:120 --out merged.pt                       of so many images each\n\n"
    "batchnorm merge soup/*.pt --parameters mean --out soup.pt                parameters averaged too"
)


def merge(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE[:WEIGHT]...",
            help="state_dicts of one network, each with its weight, say its number of images; 1 if none is given.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The file: FILE.safetensors, or FILE.pt.", show_default=False)
    ],
    parameters: Annotated[
        str,
        typer.Option(
            metavar="equal|first|mean",
            help="What is no statistic: must be equal, is the first's, or becomes the weighted mean.",
        ),
    ] = "equal",
    as_json: JsonOption = False,
) -> None:
    """Merge the running statistics of networks that saw different data: ranks, clients, parts of a soup.

    The variance of all together is that within each and that between their
    means (the law of total variance); an average of variances leaves the
    second out. Files are read as data: nothing in them is run.
    """
    from rich.console import Console
    from rich.table import Table

    from batchnorm.calibrate.states import merge_states
    from batchnorm.training.network import NetworkError
    from batchnorm.training.weights import read_state

    state_file.check(out)
    chosen: Any = one_of(("equal", "first", "mean"), parameters, "--parameters")
    states: list[tuple[dict[str, Tensor], float]] = []
    for name, weight in map(_weighted, files):
        with as_failure(NetworkError):
            states.append((read_state(Path(name), "FILE"), weight))
    with as_failure(ValueError):
        merged = merge_states(states, chosen)
    state_file.write(merged, out)
    rows = list(_spread(states, merged))
    if as_json:
        layers = [{"layer": layer, "between": between} for layer, between in rows]
        typer.echo(json.dumps({"file": str(out), "states": len(states), "layers": layers}))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("of its variance, between the files", justify="right")
    for layer, between in rows:
        table.add_row(layer or "(the model)", f"{between:.1%}")
    console = Console()
    if rows:
        console.print(table)
    show(console, f"{len(rows)} layer{'s' * (len(rows) != 1)} of {len(states)} files merged")
    typer.echo(state_file.size(out))


def _weighted(text: str) -> tuple[str, float]:
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).is_file():
        return text, 1.0
    try:
        found = float(weight)
    except ValueError:
        return text, 1.0
    if not 0 < found < float("inf"):
        raise Failure(f"{text}: a weight is a positive number")
    return name, found


def _spread(
    states: list[tuple[dict[str, Tensor], float]], merged: dict[str, Tensor]
) -> list[tuple[str, float]]:
    """Of each layer the share of its variance that lies between the files, mean over its channels."""
    import torch

    shares = torch.tensor([weight for _, weight in states], dtype=torch.float64)
    shares /= shares.sum()
    found = []
    for key, mean in merged.items():
        if key.rpartition(".")[2] != "running_mean":
            continue
        layer = key.removesuffix("running_mean").removesuffix(".")
        variance = merged[key.removesuffix("mean") + "var"].double()
        apart = torch.stack([(state[key].double() - mean.double()).square() for state, _ in states])
        between = (shares.view(-1, *[1] * mean.dim()) * apart).sum(0)
        found.append((layer, float((between / variance.clamp(min=1e-30)).mean())))
    return found
