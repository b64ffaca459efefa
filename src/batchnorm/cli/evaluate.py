"""`batchnorm evaluate`: the accuracy of trained networks, each and as an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli.network_options import CropsOption, FinalOption, StatisticsOption, ThreadsOption
from batchnorm.cli.terminal import Failure, as_failure, one_of, show
from batchnorm.cli.terminal import image_bar as _bar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from batchnorm.data.source import Source
    from batchnorm.training.evaluation import Crops, SavedNetwork
    from batchnorm.training.score import Score

EPILOG = (
    "[bold]Examples[/]\n\n"
    "batchnorm evaluate runs/NAME                       the best network of a run\n\n"
    "batchnorm evaluate runs/NAME --crops 144           as GoogLeNet was tested\n\n"
    "batchnorm evaluate runs/A runs/B                   each, and their ensemble\n\n"
    "batchnorm evaluate runs/NAME --statistics moving   by the moving averages\n\n"
    "batchnorm evaluate best.pt --data FOLDER           on other images\n\n"
    "batchnorm evaluate runs/NAME --images 1000         a quick look"
)

_TOP5_ABOVE_CLASSES = 10  # with more classes, top-5 accuracy is shown too


def evaluate(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|FILE...",
            help="A run's folder, or a best.pt or final.pt of its checkpoints; several are an ensemble.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Another data set, named as in run.toml; its validation split is used.",
            show_default="the run's",
        ),
    ] = None,
    crops: CropsOption = 1,
    statistics: StatisticsOption = "population",
    images: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of images, the first in a fixed random order of the set.", show_default="all"
        ),
    ] = None,
    final: FinalOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Measure the accuracy of trained networks on a validation set, and of their ensemble if there are several.

    An ensemble averages the class probabilities of its networks, as in
    figure 4 of the paper. Nothing is written. Networks trained in 16 bits
    are evaluated in float32.
    """
    import torch
    from rich.console import Console

    from batchnorm.data.corrupt import Corrupt
    from batchnorm.data.idx import DataError
    from batchnorm.memory import keep_memory
    from batchnorm.training import evaluation
    from batchnorm.training.network import NetworkError

    chosen_statistics = one_of(evaluation.STATISTICS, statistics, "--statistics")
    chosen_crops = one_of(evaluation.CROPS, crops, "--crops")
    if threads is not None:
        torch.set_num_threads(threads)
    if not torch.accelerator.is_available():
        keep_memory()
    console = Console()
    with as_failure(DataError, NetworkError, OSError):
        files = [evaluation.network_file(place, "final.pt" if final else "best.pt") for place in places]
        networks = [evaluation.load_network(file, chosen_statistics) for file in files]
        source, description = _source(networks, data, images)
        corrupt = Corrupt(1, len(source))
        scores = _scores(console, networks, source, chosen_crops, corrupt)
    if not scores[0].images:
        raise Failure(f"no image can be read: {corrupt}")
    sizes = sorted({network.config.data.image_size for network in networks})
    normalised = any(network.has_norms for network in networks)
    show(console, f"images      {description}")
    show(console, f"crops       {crops} of {' or '.join(f'{size} × {size}' for size in sizes)} pixels")
    show(
        console,
        "statistics  "
        + (
            f"{statistics} ({evaluation.STATISTICS[chosen_statistics]})"
            if normalised
            else "none: there is no BN"
        ),
    )
    if len(corrupt):
        show(console, f"left out    {corrupt}")
    names = [str(place) for place in places]
    console.print()
    console.print(_table(networks, names, scores, source.classes > _TOP5_ABOVE_CLASSES))


def _source(networks: Sequence[SavedNetwork], data: str | None, images: int | None) -> tuple[Source, str]:
    """The images on which the `networks` are evaluated, and a description."""
    from batchnorm.data.catalogue import load
    from batchnorm.data.idx import DataError
    from batchnorm.data.subset import Subset

    named = sorted({network.config.data.source for network in networks})
    if data is None and len(named) > 1:
        raise Failure(f"the networks were trained on {' and '.join(named)}: choose one with --data")
    name = data or named[0]
    try:
        whole = load(name, "val")
    except DataError as error:
        raise Failure(str(error) if data else f"{error}; name the run's data with --data") from None
    for network in networks:
        network.expect(whole, name)
    if images is None or images >= len(whole):
        return whole, f"{len(whole):,}, the validation set of {name}"
    return Subset(whole, images), (
        f"{images:,} of {len(whole):,}, the first in a fixed random order, of the validation set of {name}"
    )


def _scores(
    console: Console, networks: Sequence[SavedNetwork], source: Source, crops: Crops, corrupt: Any
) -> list[Score]:
    """The score of each network and, if there are several, of their ensemble."""
    from batchnorm.training.evaluation import Predictions

    with _bar(console, len(source), len(networks)) as advance:
        every = [
            saved.predictions(source, crops, corrupt, advance, saved.config.machine.loaders)
            for saved in networks
        ]
    ensemble = [Predictions.mean(every)] if len(every) > 1 else []
    return [predictions.score for predictions in every + ensemble]


def _table(
    networks: Sequence[SavedNetwork], names: Sequence[str], scores: Sequence[Score], top5: bool
) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("network", overflow="fold", header_style="dim", vertical="top")
    for name in (
        "step",
        "top-1\naccuracy",
        "top-1\nerror",
        *(("top-5\naccuracy", "top-5\nerror") if top5 else ()),
    ):
        table.add_column(name, justify="right", no_wrap=True, header_style="dim")
    steps = [f"{network.step:,}" for network in networks]
    if len(networks) > 1:
        names, steps = [*names, f"ensemble of {len(networks)}"], [*steps, ""]
    for at, (name, step, score) in enumerate(zip(names, steps, scores, strict=True)):
        shares = [score.accuracy, 1 - score.accuracy]
        if top5:
            shares += [score.accuracy_top5, 1 - score.accuracy_top5]
        row = [name, step, *(f"{share:.2%}" for share in shares)]
        table.add_row(*map(Text, row), style="bold" if at == len(networks) else "")
    return table
