"""`batchnorm fold` and `batchnorm export`: a network without batch normalization, for deployment."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli import named_model, state_file
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

if TYPE_CHECKING:
    from batchnorm.passes.fold.folded import FoldReport

FOLD_EPILOG = (
    "[bold]Examples[/]\n\n"
    "batchnorm fold torchvision:resnet18                             what would be folded, and where to\n\n"
    "batchnorm fold timm:repvgg_a0 --weights w.pth --out folded.safetensors\n\n"
    "batchnorm fold mycode.nets:unet --set width=32 --input 1,1,256,256\n\n"
    "batchnorm fold runs/NAME --json                                 for scripts"
)
EXPORT_EPILOG = (
    "[bold]Examples[/]\n\n"
    "batchnorm export runs/NAME --out net.onnx                       a network trained here\n\n"
    "batchnorm export torchvision:resnet18 --weights resnet18.pth --out net.onnx\n\n"
    "batchnorm export timm:levit_128s --out net.pt2 --fixed          for batches of one size"
)
_FORMATS = ("onnx", "pt2", "safetensors")


def fold(
    model: ModelArgument,
    weights: WeightsOption = None,
    out: OutOption = None,
    settings: SetOption = None,
    inputs: InputOption = None,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Fold the batch normalization of a network into its neighbours, and show which went where.

    Each fold is proven in float64. The file has the plain weights, by the
    names that they have in the copy that bn.fold returns. The exit code is 1
    if something failed; a layer that stays is no failure.
    """
    from rich.console import Console

    from batchnorm.passes.fold import fold as fold_model

    state_file.check(out)
    console = Console(stderr=True)
    named = named_model.find(model, weights, settings or (), inputs or (), dtype)
    with console.status("folding"), as_failure(ValueError, RuntimeError):
        folded, report = fold_model(named.model, *named.inputs)
    if out is not None:
        state_file.write(folded.state_dict(), out)
    if as_json:
        typer.echo(json.dumps(_numbers(report, named.has_weights) | {"file": out and str(out)}))
        return
    show_layers(Console(), report, "into, or why not")
    warn_of_random_weights(console, named.has_weights)
    if out is not None:
        typer.echo(state_file.size(out))


def export(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The file: .onnx, .pt2 or .safetensors.", show_default=False)
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="onnx|pt2|safetensors", help="The format.", show_default="FILE's suffix"
        ),
    ] = None,
    weights: WeightsOption = None,
    settings: SetOption = None,
    inputs: InputOption = None,
    dtype: DtypeOption = "float32",
    fixed: Annotated[bool, typer.Option("--fixed", help="For batches of the example's size alone.")] = False,
    opset: Annotated[
        int | None, typer.Option(min=9, help="The opset of ONNX.", show_default="torch's default")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fold a network, write it for another runtime, and compare what the file computes with the network.

    The file is kept only if its outputs are the network's: from an example,
    from random images, and from a batch of another size. Until then it has
    another name. The exit code is 1 if there is no file.
    """
    from rich.console import Console

    from batchnorm.passes.export import export as export_model

    chosen: Any = one_of(_FORMATS, to, "--to") if to is not None else None
    console = Console(stderr=True)
    named = named_model.find(model, weights, settings or (), inputs or (), dtype)
    with console.status("folding, writing, comparing"), as_failure(ValueError, RuntimeError, OSError):
        report = export_model(named.model, out, *named.inputs, dynamic=not fixed, to=chosen, opset=opset)
    if as_json:
        about = {"file": str(out), "format": report.format, "bytes": report.size, "compared": report.compared}
        numbers = _numbers(report.folded, named.has_weights) | about | {"error": report.error}
        typer.echo(json.dumps(numbers))
        return
    show_layers(Console(), report.folded, "into, or why not")
    warn_of_random_weights(console, named.has_weights)
    typer.echo(str(report).splitlines()[-1])


def _numbers(report: FoldReport, has_weights: bool) -> dict[str, Any]:
    numbers = asdict(report)
    numbers["fold_error"] = numbers.pop("error")
    return numbers | {"random_weights": not has_weights}
