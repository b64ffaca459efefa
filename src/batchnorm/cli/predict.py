"""`batchnorm predict`: the classes of images, by a trained network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.network_options import CropsOption, FinalOption, StatisticsOption, ThreadsOption
from batchnorm.cli.terminal import Failure, as_failure, image_bar, one_of, show

EPILOG = (
    "[bold]Examples[/]\n\n"
    "batchnorm predict runs/NAME cat.jpg dog.png        what is in two images\n\n"
    "batchnorm predict runs/NAME photos --top 3         all images in a folder, three classes of each\n\n"
    "batchnorm predict runs/NAME photos --json          a line of JSON for each, for scripts"
)


def predict(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|FILE",
            help="A run's folder, or a best.pt or final.pt of its checkpoints.",
            show_default=False,
        ),
    ],
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE", help="Image files, or folders with images in them.", show_default=False
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Number of classes shown for each image.")] = 1,
    crops: CropsOption = 1,
    statistics: StatisticsOption = "population",
    final: FinalOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each image, one a line.")
    ] = False,
    threads: ThreadsOption = None,
) -> None:
    """Classify images with a trained network, and print each image's likeliest classes with their probabilities.

    Nothing is written. An image that cannot be read is named, and the exit
    code is then 1.
    """
    import torch
    from rich.console import Console

    from batchnorm.data.corrupt import Corrupt
    from batchnorm.data.files import ImageFiles
    from batchnorm.data.idx import DataError
    from batchnorm.training import evaluation
    from batchnorm.training.network import NetworkError

    chosen_statistics = one_of(evaluation.STATISTICS, statistics, "--statistics")
    chosen_crops = one_of(evaluation.CROPS, crops, "--crops")
    if threads is not None:
        torch.set_num_threads(threads)
    with as_failure(DataError, NetworkError, OSError):
        saved = evaluation.load_network(
            evaluation.network_file(run, "final.pt" if final else "best.pt"), chosen_statistics
        )
        files = ImageFiles(images, saved.channels, saved.classes)
        corrupt = Corrupt(1, len(files))
        with image_bar(Console(stderr=True), len(files), 1) as advance:
            predictions = saved.predictions(files, chosen_crops, corrupt, advance)
    console = Console()
    for number, probabilities in enumerate(predictions.probabilities):
        name = files.name(number)
        if name in corrupt.found:
            why = corrupt.found[name]
            typer.echo(
                json.dumps({"image": name, "error": why}, ensure_ascii=False)
                if as_json
                else f"{name}: {why}",
                err=not as_json,
            )
            continue
        likeliest = probabilities.topk(min(top, saved.classes))
        found = [
            {"class": saved.class_names[place], "probability": value}
            for place, value in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        ]
        if as_json:
            typer.echo(json.dumps({"image": name, "classes": found}, ensure_ascii=False))
        else:
            show(
                console,
                f"{name}  " + "  ".join(f"{each['class']} {each['probability']:.2%}" for each in found),
            )
    if len(corrupt):
        raise Failure(f"{len(corrupt):,} of {len(files):,} images could not be read")
