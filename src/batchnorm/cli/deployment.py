"""`batchnorm fold` and `batchnorm export`: a network without batch normalization, for deployment."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli import named_model
from batchnorm.cli.named_model import DtypeOption, InputOption, ModelArgument, SetOption, WeightsOption
from batchnorm.cli.terminal import Failure, as_failure, one_of, show

if TYPE_CHECKING:
    from rich.console import Console

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
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_FORMATS = ("onnx", "pt2", "safetensors")


def fold(
    model: ModelArgument,
    weights: WeightsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the folded weights: FILE.safetensors, or FILE.pt.", show_default=False
        ),
    ] = None,
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

    if out is not None and out.suffix not in (".safetensors", ".pt", ".pth"):
        raise Failure(f"--out {out}: the name must end in .safetensors, .pt or .pth")
    if out is not None and not out.parent.is_dir():
        raise Failure(f"--out {out}: there is no folder {out.parent}: make it first")
    console = Console(stderr=True)
    named = named_model.find(model, weights, settings or (), inputs or (), dtype)
    with console.status("folding"), as_failure(ValueError, RuntimeError):
        folded, report = fold_model(named.model, *named.inputs)
    if out is not None:
        from batchnorm.atomic_file import replacing
        from batchnorm.passes.export import as_safetensors

        with as_failure(OSError), replacing(out) as file:
            make = as_safetensors if out.suffix == ".safetensors" else _by_torch
            file.write_bytes(make(folded.state_dict()))
    if as_json:
        typer.echo(json.dumps(_numbers(report, named.has_weights) | {"file": out and str(out)}))
        return
    _show(Console(), report)
    _warn_of_random_weights(console, named.has_weights)
    if out is not None:
        typer.echo(f"{out}: {out.stat().st_size / 1e6:,.1f} MB")


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
    _show(Console(), report.folded)
    _warn_of_random_weights(console, named.has_weights)
    typer.echo(str(report).splitlines()[-1])


def _show(console: Console, report: FoldReport) -> None:
    """A table of the layers, and what the network was and is."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "outcome", "into, or why not"):
        table.add_column(column, overflow="fold")
    styles = {"folded": "green", "affine": "yellow", "left alone": "red"}
    for layer in report.layers:
        text = "; ".join(filter(None, (layer.what.removeprefix("into "), layer.why)))
        table.add_row(
            layer.name or "(the model)", f"[{styles[layer.outcome]}]{layer.outcome}[/]", _plain(text)
        )
    if report.layers:
        console.print(table)
    show(console, report.summary)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _warn_of_random_weights(console: Console, has_weights: bool) -> None:
    if not has_weights:
        show(console, "The weights are random: give those of a trained network, --weights FILE.", "yellow")


def _numbers(report: FoldReport, has_weights: bool) -> dict[str, Any]:
    numbers = asdict(report)
    numbers["fold_error"] = numbers.pop("error")
    return numbers | {"random_weights": not has_weights}


def _by_torch(state: dict[str, Any]) -> bytes:
    import torch

    content = io.BytesIO()  # to a full disk torch.save would raise RuntimeError instead of OSError
    torch.save(state, content)
    return content.getvalue()
