"""`batchnorm reproduce`: an experiment of the paper, from its options to the report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from batchnorm.cli import run_settings
from batchnorm.cli.terminal import (
    Failure,
    command_line,
    from_options,
    in_one_line,
    new_folder,
    show,
    words,
)

if TYPE_CHECKING:
    from batchnorm.experiments.claim import Settings
    from batchnorm.experiments.imagenet.inception_settings import ImagenetSettings
    from batchnorm.experiments.run import Experiment
    from batchnorm.training.config import Config

    S = TypeVar("S", bound=Settings)

_Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on with the run in --out, or with the newest one, to the same numbers."
    ),
]
_Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Networks trained at the same time.",
        show_default="one a core; one at the paper's scale",
    ),
]
_Seeds = Annotated[
    int | None,
    typer.Option(min=1, help="How many seeds, 0, 1, ..., the verdict averages over.", show_default="3"),
]
_Width = Annotated[
    float | None, typer.Option(help="Multiplies every number of channels.", show_default="0.25")
]

app = typer.Typer(help="Reproduce an experiment of the paper (Ioffe & Szegedy 2015).", no_args_is_help=True)


@app.command(
    "mnist",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm reproduce mnist                       figure 1, 2.5 min on 2 cores\n\n"
    "batchnorm reproduce mnist --claims all          every claim, about 12 min\n\n"
    "batchnorm reproduce mnist --data fashion-mnist  the same on clothes\n\n"
    "batchnorm reproduce mnist --resume              go on with a stopped run",
)
def mnist(
    data: Annotated[
        str | None,
        typer.Option(
            help="mnist-10k (the digits in this package), mnist, fashion-mnist, or a folder of IDX files, "
            "gzipped or not.",
            show_default="mnist-10k",
        ),
    ] = None,
    claims: Annotated[
        str | None,
        typer.Option(
            help="Claims to test, separated by commas, or 'all'; 'list' shows them.", show_default="figure-1"
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the longest run; no run is longer.", show_default="50000"),
    ] = None,
    seeds: _Seeds = None,
    rate: Annotated[
        float | None,
        typer.Option(help="The learning rate that both networks of figure 1 share.", show_default="0.1"),
    ] = None,
    init_std: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the hidden layers' initial weights (not for the claims that vary it).",
            show_default="0.1",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="The run's folder.", show_default="runs/mnist-DATE-TIME"),
    ] = None,
    resume: _Resume = False,
    workers: _Workers = None,
) -> None:
    """The handwritten digits of section 4.1 and figure 1: the same network with and without batch normalization.

    Trains 784-100-100-100-10 sigmoid networks on binary 28×28 digits in
    batches of 60 and writes a folder with records.jsonl, TensorBoard
    events, figures and report.html. Ctrl-C loses nothing: --resume goes on.
    """
    from batchnorm.data.digits import Digits
    from batchnorm.experiments.mnist import claim_names, claim_title, mnist_experiment
    from batchnorm.experiments.mnist.digits_settings import DigitsSettings

    if _listed(claims, claim_names(), claim_title):
        return
    chosen = _given(
        data=data,
        steps=steps,
        seeds=seeds,
        rate=rate,
        init_std=init_std,
        claims=_named(claims, claim_names()),
    )
    # what is wrong with the data is said here, in one line, and not by a worker
    _run(
        "mnist",
        DigitsSettings,
        claim_names(),
        lambda wanted: mnist_experiment(wanted, Digits.load(wanted.data)),
        chosen,
        out,
        resume,
        workers,
    )


@app.command(
    "imagenet",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm reproduce imagenet --quick              a look, ten minutes on 2 cores\n\n"
    "batchnorm reproduce imagenet                      the scaled run on Fashion-MNIST, 2 hours\n\n"
    "batchnorm reproduce imagenet --claims ablation    each change of section 4.2.1 left out\n\n"
    "batchnorm reproduce imagenet --data /data/imagenet    the paper's own scale, on one machine\n\n"
    "batchnorm reproduce imagenet --data /data/imagenet --toml plan    its run.toml files, for torchrun on many\n\n"
    "batchnorm reproduce imagenet --resume             go on with a stopped run",
)
def imagenet(
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, a fifth of the steps, 2,000 validation images.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="A name (fashion-mnist, mnist, cifar-10, mnist-10k) for the scaled run; or a folder in ImageNet's "
            "layout or with WebDataset shards, for the paper's.",
            show_default="fashion-mnist",
        ),
    ] = None,
    claims: Annotated[
        str | None,
        typer.Option(
            help="Claims to test, separated by commas, or 'all'; 'list' shows them.",
            show_default="figure-3,failures",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=50, help="Of Inception and BN-Baseline; the others take a fifth of it.", show_default="8000"
        ),
    ] = None,
    seeds: _Seeds = None,
    width: _Width = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="The run's folder.", show_default="runs/imagenet-DATE-TIME"),
    ] = None,
    toml: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Train nothing: write each network's run.toml into this folder, for batchnorm train under torchrun.",
        ),
    ] = None,
    resume: _Resume = False,
    workers: _Workers = None,
) -> None:
    """The Inception networks of section 4.2: steps to Inception's best accuracy, and how high each ends.

    Trains Inception, BN-Baseline, BN-x5, BN-x30 and BN-x5-Sigmoid, and
    Inception where the paper saw it fail. By default a scaled run, and
    labelled so: a quarter of the channels on the 60,000 images of Fashion-
    MNIST. Writes a folder with records.jsonl, TensorBoard events, figures
    and report.html. Ctrl-C loses nothing: --resume goes on.
    """
    from batchnorm.experiments.imagenet import claim_names, claim_title, imagenet_experiment
    from batchnorm.experiments.imagenet.inception_settings import ImagenetSettings, preset

    if _listed(claims, claim_names(), claim_title):
        return
    chosen = _given(data=data, steps=steps, seeds=seeds, width=width, claims=_named(claims, claim_names()))
    if not resume:
        chosen = preset(quick, data) | chosen
    elif quick:
        raise Failure("--quick cannot change when a run is continued: leave it out")
    if toml is not None:
        _write_plan(from_options(ImagenetSettings, chosen), toml)
        return
    if workers is None and chosen.get("scale") == "paper":
        workers = 1
    _run("imagenet", ImagenetSettings, claim_names(), imagenet_experiment, chosen, out, resume, workers)


@app.command(
    "ensemble",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm reproduce ensemble --quick      a look, ten minutes on 2 cores\n\n"
    "batchnorm reproduce ensemble              the scaled run on Fashion-MNIST, half an hour\n\n"
    "batchnorm reproduce ensemble --resume     go on with a stopped run",
)
def ensemble(
    quick: Annotated[
        bool, typer.Option("--quick", help="A quarter of the steps, 300 validation images.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="As for reproduce imagenet.", show_default="fashion-mnist"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=50, help="Of Inception; the networks take a fifth of it.", show_default="8000"),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Of Inception; that of the networks is 30 times as high.", show_default="0.005"),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Of the validation set, in 144 crops each.", show_default="2000"),
    ] = None,
    width: _Width = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="The run's folder.", show_default="runs/ensemble-DATE-TIME"),
    ] = None,
    resume: _Resume = False,
    workers: _Workers = None,
) -> None:
    """The ensemble of section 4.2.3: six BN-x30 networks, each a little different, and the mean of what they say.

    Trains the six, asks each about validation images in one crop and in
    144, and sets the ensemble beside its networks, as figure 4 does.
    """
    from batchnorm.experiments.imagenet import ensemble_experiment
    from batchnorm.experiments.imagenet.ensemble import EnsembleSettings, preset

    chosen = _given(data=data, steps=steps, rate=rate, images=images, width=width)
    if not resume:
        chosen = preset(quick, data) | chosen
    elif quick:
        raise Failure("--quick cannot change when a run is continued: leave it out")
    _run("ensemble", EnsembleSettings, ("ensemble",), ensemble_experiment, chosen, out, resume, workers)


def _write_plan(wanted: ImagenetSettings, folder: Path) -> None:
    from batchnorm.experiments.imagenet import imagenet_experiment
    from batchnorm.training.toml import to_toml

    if len(wanted.rates) > 1:
        raise Failure(
            "--toml needs Inception's rate, which the scaled run finds by a sweep: name data of ImageNet's kind"
        )
    jobs: dict[str, Config] = {}
    for claim in imagenet_experiment(wanted).claims:
        jobs |= claim.jobs(wanted, {})
    with in_one_line(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for name, config in jobs.items():
            (folder / f"{name}.toml").write_text(to_toml(config), encoding="utf-8")
    for name in jobs:
        typer.echo(f"torchrun ... -m batchnorm.cli train {folder / name}.toml --out runs/{name}")


def _listed(claims: str | None, names: tuple[str, ...], title: Callable[[str], str]) -> bool:
    """Print the claims if that was asked."""
    if claims != "list":
        return False
    for name in names:
        typer.echo(f"{name:24} {title(name)}")
    return True


def _named(claims: str | None, names: tuple[str, ...]) -> tuple[str, ...] | None:
    if claims is None:
        return None
    return names if claims == "all" else words(claims)


def _given(**options: Any) -> dict[str, Any]:
    """Those that the user gave."""
    return {name: value for name, value in options.items() if value is not None}


def _run(
    kind: str,
    model: type[S],
    claim_names: tuple[str, ...],
    make: Callable[[S], Experiment[S, Any]],
    chosen: dict[str, Any],
    out: Path | None,
    resume: bool,
    workers: int | None,
) -> None:
    from rich.console import Console

    from batchnorm.data.idx import DataError
    from batchnorm.experiments.progress import Display, summary
    from batchnorm.experiments.run import Stopped
    from batchnorm.records import RecordError
    from batchnorm.training.checkpoint import CheckpointError
    from batchnorm.training.workers import WorkerDied

    folder = out or (run_settings.newest_run(kind) if resume else new_folder(kind))
    console = Console()
    go_on = f"batchnorm reproduce {kind} --out {shlex.quote(str(folder))} --resume"
    with in_one_line(DataError, RecordError, CheckpointError):
        if resume:
            wanted = run_settings.read_from(folder, kind, model, chosen)
        else:
            wanted = run_settings.chosen_for(folder, model, claim_names, chosen)
        experiment = make(wanted)
        with in_one_line(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        show(console, f"run folder  {folder}")
        try:
            with Display(console) as display:
                verdicts = experiment.run(wanted, folder, _command(folder), display, workers)
        except (Stopped, KeyboardInterrupt):
            if (folder / "report.html").exists():
                show(console, f"\nStopped. What there is:  {folder / 'report.html'}")
            show(console, f"Go on with:  {go_on}")
            raise typer.Exit(130) from None
        except (WorkerDied, OSError) as error:
            raise Failure(f"{error}; nothing that was saved is lost, go on with: {go_on}") from None
    console.print(summary(verdicts))
    show(console, f"report  {folder / 'report.html'}")


def _command(folder: Path) -> str:
    """The command line for the record, with the run's folder, so that --resume can be added to it."""
    command = command_line()
    if not any(word == "--out" or word.startswith("--out=") for word in sys.argv):
        command += f" --out {shlex.quote(str(folder))}"
    return command.encode(errors="surrogateescape").decode(errors="replace")  # a path need not be text
