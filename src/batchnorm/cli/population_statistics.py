"""`batchnorm population`: the statistics that inference is to use, measured over a data set."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from batchnorm.cli import named_model, state_file
from batchnorm.cli.image_batches import (
    Batches,
    BatchSizeOption,
    DataOption,
    ImagesOption,
    MeanOption,
    SizeOption,
    StdOption,
)
from batchnorm.cli.layers_table import show_layers, warn_of_random_weights
from batchnorm.cli.named_model import (
    DtypeOption,
    InputOption,
    JsonOption,
    ModelArgument,
    SetOption,
    WeightsOption,
)
from batchnorm.cli.state_file import OutOption
from batchnorm.cli.terminal import as_failure, one_of

EPILOG = (
    "[bold]Examples[/]\n\n"
    "batchnorm population torchvision:resnet18 --weights resnet18.pth --data FOLDER --out measured.safetensors\n\n"
    "batchnorm population timm:mobilenetv3_small_050 --weights w.pth --data FOLDER --tolerance 0.02\n\n"
    "batchnorm population runs/NAME --data mnist-10k --images 2000 --json"
)


def population(
    model: ModelArgument,
    data: DataOption,
    weights: WeightsOption = None,
    out: OutOption = None,
    estimator: Annotated[
        str,
        typer.Option(
            metavar="paper|pooled",
            help="The variance: of batches, averaged and unbiased, as the paper has it; or of all values.",
        ),
    ] = "paper",
    images: ImagesOption = None,
    batch_size: BatchSizeOption = 64,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="Stop when the standard error of every layer is below: 0.01 is 1 %."),
    ] = 0.0,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Measure layer by layer, a pass over the images for each.")
    ] = False,
    size: SizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    settings: SetOption = None,
    inputs: InputOption = None,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Measure the population statistics of a network (algorithm 2 of the paper, line 10), and write its weights.

    Only batch normalization is in training mode meanwhile. The images come
    in a random order, and each layer is shown with the standard error of
    its statistics. Ctrl-C leaves no file.
    """
    from rich.console import Console

    from batchnorm.passes.estimate import population as measure

    state_file.check(out)
    chosen: Any = one_of(("paper", "pooled"), estimator, "--estimator")
    console = Console(stderr=True)
    named = named_model.find(model, weights, settings or (), inputs or (), dtype)
    batches = Batches(named, data, images, batch_size, size, mean, std)
    with as_failure(ValueError, RuntimeError):
        report = measure(
            named.model,
            batches,
            chosen,
            tolerance=tolerance,
            sequential=sequential,
            progress=console.is_terminal,
        )
    if out is not None:
        state_file.write(named.model.state_dict(), out)
    if as_json:
        errors = {layer: error if error == error else None for layer, error in report.errors}  # not nan
        numbers = asdict(report) | {"errors": errors, "file": out and str(out)}
        typer.echo(json.dumps(numbers | {"random_weights": not named.has_weights}))
        return
    show_layers(Console(), report, "from what, or why not")
    warn_of_random_weights(console, named.has_weights)
    if out is not None:
        typer.echo(state_file.size(out))
