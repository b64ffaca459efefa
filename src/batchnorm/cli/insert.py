"""`batchnorm insert`: batch normalization into a network that has none."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from batchnorm.cli import named_model, state_file
from batchnorm.cli.image_batches import Batches, MeanOption, SizeOption, StdOption
from batchnorm.cli.layers_table import show_layers
from batchnorm.cli.named_model import (
    DtypeOption,
    InputOption,
    JsonOption,
    ModelArgument,
    SetOption,
    WeightsOption,
)
from batchnorm.cli.state_file import OutOption
from batchnorm.cli.terminal import Failure, as_failure, show

EPILOG = (
    "[bold]Examples[/]\n\n"
    "batchnorm insert torchvision:vgg11                             where it would go\n\n"
    "batchnorm insert torchvision:alexnet --where 'features.*' --dropout keep\n\n"
    "batchnorm insert torchvision:alexnet --weights alexnet.pth --data FOLDER --out with_bn.safetensors\n\n"
    "batchnorm insert mycode.nets:unet --input 8,3,64,64 --json     for scripts"
)


def insert(
    model: ModelArgument,
    weights: WeightsOption = None,
    out: OutOption = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Modules, by name or pattern: features.*; repeat.", show_default="all"
        ),
    ] = None,
    dropout: Annotated[
        str, typer.Option(metavar="drop|keep|P", help="Remove dropout, keep it, or make its probability P.")
    ] = "drop",
    data: Annotated[
        str | None,
        typer.Option(
            help="Images, named as in run.toml, from which the layers get statistics, weight and bias with which the "
            "network computes what it did.",
            show_default="new layers: weight 1, bias 0",
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="How many images of --data.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=2, help="Images in a batch of --data.")] = 50,
    size: SizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    settings: SetOption = None,
    inputs: InputOption = None,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Put batch normalization before each nonlinearity of a network (algorithm 2 of the paper), and show where.

    A layer stands in the convolution or linear module whose output it
    normalises, as its child norm; names and weights of the network stay.
    Biases that it makes useless go, and so does dropout. To use the file of
    --out, call bn.insert on the network, then load it.
    """
    from rich.console import Console

    from batchnorm.passes.insert import insert as insert_layers

    state_file.check(out)
    console = Console(stderr=True)
    named = named_model.find(model, weights, settings or (), inputs or (), dtype)
    given = [_several(each) for each in named.inputs]
    with as_failure(ValueError, RuntimeError):
        chosen: Any = dropout if dropout in ("drop", "keep") else _probability(dropout)
        batches = None if data is None else Batches(named, data, images, batch_size, size, mean, std)
        with console.status("running the network"):
            changed, report = insert_layers(
                named.model, *given, where=where, dropout=chosen, identity=batches
            )
    if out is not None:
        state_file.write(changed.state_dict(), out)
    if as_json:
        typer.echo(
            json.dumps(asdict(report) | {"random_weights": not named.has_weights, "file": out and str(out)})
        )
        return
    show_layers(Console(), report, "what, or why not")
    if data is None and named.has_weights:
        show(
            console,
            "The layers are new, so the network computes something else than before: train it, or give --data.",
            "yellow",
        )
    if out is not None:
        typer.echo(state_file.size(out))


def _several(example: Any) -> Any:
    """A batch of two for one of one: in training mode, a layer that is there already needs two."""
    import torch

    if isinstance(example, torch.Tensor) and example.dim() > 1 and len(example) == 1:
        return torch.cat([example, example.flip(-1)])
    return example


def _probability(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Failure(f"--dropout {text}: write drop, keep or a probability, as 0.1") from None
