"""`batchnorm reproduce`: run an experiment of the paper, from its options to the report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from batchnorm.cli import run_settings
from batchnorm.cli.model_options import model_option
from batchnorm.cli.terminal import (
    Failure,
    as_failure,
    command_line,
    from_options,
    new_folder,
    show,
    words,
)
from batchnorm.experiments.claim import Settings
from batchnorm.experiments.imagenet import ensemble_settings, inception_settings
from batchnorm.experiments.imagenet.ensemble_settings import EnsembleSettings
from batchnorm.experiments.imagenet.inception_settings import ImagenetSettings, InceptionSettings
from batchnorm.experiments.mnist.digits_settings import DigitsSettings

if TYPE_CHECKING:
    from batchnorm.experiments.run import Experiment
    from batchnorm.training.config import Config

    S = TypeVar("S", bound=Settings)

_Resume = Annotated[
    bool,
    typer.Option("--resume", help="Resume the run in --out, or the newest one, to the same numbers."),
]
_Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Networks trained at the same time.",
        show_default="one per core; one at the paper's scale",
    ),
]
_Seeds = Annotated[int | None, model_option(Settings, "seeds")]
_Width = Annotated[float | None, model_option(InceptionSettings, "width")]

app = typer.Typer()


@app.command(
    "mnist",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm reproduce mnist                       figure 1, 2.5 min on 2 cores\n\n"
    "batchnorm reproduce mnist --claims all          every claim, about 12 min\n\n"
    "batchnorm reproduce mnist --data fashion-mnist  the same on clothes\n\n"
    "batchnorm reproduce mnist --resume              resume a stopped run",
)
def mnist(
    data: Annotated[str | None, model_option(DigitsSettings, "data")] = None,
    claims: Annotated[str | None, model_option(DigitsSettings, "claims")] = None,
    steps: Annotated[int | None, model_option(DigitsSettings, "steps")] = None,
    seeds: _Seeds = None,
    rate: Annotated[float | None, model_option(DigitsSettings, "rate")] = None,
    init_std: Annotated[float | None, model_option(DigitsSettings, "init_std")] = None,
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
    events, figures and report.html. Ctrl-C loses nothing: use --resume.
    """
    from batchnorm.data.digits import Digits
    from batchnorm.experiments.mnist.digits_experiment import claim_names, claim_title, mnist_experiment

    if _print_claims(claims, claim_names(), claim_title):
        return
    chosen = _without_none(
        data=data,
        steps=steps,
        seeds=seeds,
        rate=rate,
        init_std=init_std,
        claims=_claims(claims, claim_names()),
    )
    # Digits.load reports problems with the data here, in one line, and not in a worker
    _run(
        "mnist",
        DigitsSettings,
        claim_names(),
        lambda settings: mnist_experiment(settings, Digits.load(settings.data)),
        chosen,
        out,
        resume,
        workers,
    )


@app.command(
    "imagenet",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm reproduce imagenet --quick              ten minutes on 2 cores\n\n"
    "batchnorm reproduce imagenet                      the scaled run on Fashion-MNIST, 2 hours\n\n"
    "batchnorm reproduce imagenet --claims ablation    each change of section 4.2.1 left out\n\n"
    "batchnorm reproduce imagenet --data /data/imagenet    the paper's own scale, on one machine\n\n"
    "batchnorm reproduce imagenet --data /data/imagenet --toml plan    its run.toml files, for torchrun on many\n\n"
    "batchnorm reproduce imagenet --resume             resume a stopped run",
)
def imagenet(
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, a fifth of the steps, 2,000 validation images.")
    ] = False,
    data: Annotated[str | None, model_option(ImagenetSettings, "data")] = None,
    claims: Annotated[str | None, model_option(ImagenetSettings, "claims")] = None,
    steps: Annotated[int | None, model_option(ImagenetSettings, "steps")] = None,
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
            help="Do not train; write each network's run.toml into this folder, for batchnorm train under torchrun.",
        ),
    ] = None,
    resume: _Resume = False,
    workers: _Workers = None,
) -> None:
    """The Inception networks of section 4.2: steps to Inception's best accuracy, and the best accuracy of each.

    Trains Inception, BN-Baseline, BN-x5, BN-x30 and BN-x5-Sigmoid, and
    Inception with the settings that fail in the paper. By default a scaled
    run, labelled as such: a quarter of the channels on the 60,000 images of
    Fashion-MNIST. Writes a folder with records.jsonl, TensorBoard events,
    figures and report.html. Ctrl-C loses nothing: use --resume.
    """
    from batchnorm.experiments.imagenet.inception_experiment import (
        claim_names,
        claim_title,
        imagenet_experiment,
    )

    if _print_claims(claims, claim_names(), claim_title):
        return
    chosen = _without_none(
        data=data, steps=steps, seeds=seeds, width=width, claims=_claims(claims, claim_names())
    )
    if not resume:
        chosen = inception_settings.preset(quick, data) | chosen
    elif quick:
        raise Failure("--quick cannot change when a run is resumed: leave it out")
    if toml is not None:
        _write_plan(from_options(ImagenetSettings, chosen), toml)
        return
    if workers is None and chosen.get("scale") == "paper":
        workers = 1
    _run("imagenet", ImagenetSettings, claim_names(), imagenet_experiment, chosen, out, resume, workers)


@app.command(
    "ensemble",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm reproduce ensemble --quick      ten minutes on 2 cores\n\n"
    "batchnorm reproduce ensemble              the scaled run on Fashion-MNIST, half an hour\n\n"
    "batchnorm reproduce ensemble --resume     resume a stopped run",
)
def ensemble(
    quick: Annotated[
        bool, typer.Option("--quick", help="A quarter of the steps, 300 validation images.")
    ] = False,
    data: Annotated[
        str | None, model_option(EnsembleSettings, "data", help="As for reproduce imagenet.")
    ] = None,
    steps: Annotated[
        int | None,
        model_option(EnsembleSettings, "steps", help="Of Inception; the networks take a fifth of it."),
    ] = None,
    rate: Annotated[float | None, model_option(EnsembleSettings, "rate")] = None,
    images: Annotated[int | None, model_option(EnsembleSettings, "images")] = None,
    width: _Width = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="The run's folder.", show_default="runs/ensemble-DATE-TIME"),
    ] = None,
    resume: _Resume = False,
    workers: _Workers = None,
) -> None:
    """The ensemble of section 4.2.3: six modified BN-x30 networks and the mean of their class probabilities.

    Trains the six, evaluates each on validation images by one crop and by
    144, and compares the ensemble with its networks, as in figure 4.
    """
    from batchnorm.experiments.imagenet.inception_experiment import ensemble_experiment

    chosen = _without_none(data=data, steps=steps, rate=rate, images=images, width=width)
    if not resume:
        chosen = ensemble_settings.preset(quick, data) | chosen
    elif quick:
        raise Failure("--quick cannot change when a run is resumed: leave it out")
    _run("ensemble", EnsembleSettings, ("ensemble",), ensemble_experiment, chosen, out, resume, workers)


def _write_plan(settings: ImagenetSettings, folder: Path) -> None:
    from batchnorm.experiments.imagenet.inception_experiment import imagenet_experiment
    from batchnorm.training.toml import to_toml

    if len(settings.rates) > 1:
        raise Failure(
            "--toml needs Inception's rate, which the scaled run finds by a sweep: name data of ImageNet's kind"
        )
    jobs: dict[str, Config] = {}
    for claim in imagenet_experiment(settings).claims:
        jobs |= claim.jobs(settings, {})
    with as_failure(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for name, config in jobs.items():
            (folder / f"{name}.toml").write_text(to_toml(config), encoding="utf-8")
    for name in jobs:
        typer.echo(f"torchrun ... -m batchnorm.cli train {folder / name}.toml --out runs/{name}")


def _print_claims(claims: str | None, names: tuple[str, ...], title: Callable[[str], str]) -> bool:
    """Print the claims if `claims` is "list"; return whether it is."""
    if claims != "list":
        return False
    for name in names:
        typer.echo(f"{name:24} {title(name)}")
    return True


def _claims(claims: str | None, names: tuple[str, ...]) -> tuple[str, ...] | None:
    if claims is None:
        return None
    return names if claims == "all" else words(claims)


def _without_none(**options: Any) -> dict[str, Any]:
    """The options that the user gave: those that are not None."""
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
    resume_command = f"batchnorm reproduce {kind} --out {shlex.quote(str(folder))} --resume"
    with as_failure(DataError, RecordError, CheckpointError):
        if resume:
            settings = run_settings.resumed_run_settings(folder, kind, model, chosen)
        else:
            settings = run_settings.new_run_settings(folder, model, claim_names, chosen)
        experiment = make(settings)
        with as_failure(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        show(console, f"run folder  {folder}")
        try:
            with Display(console) as display:
                verdicts = experiment.run(settings, folder, _command(folder), display, workers)
        except (Stopped, KeyboardInterrupt):
            if (folder / "report.html").exists():
                show(console, f"\nStopped. Results so far:  {folder / 'report.html'}")
            show(console, f"Resume with:  {resume_command}")
            raise typer.Exit(130) from None
        except (WorkerDied, OSError) as error:
            raise Failure(f"{error}; nothing that was saved is lost, resume with: {resume_command}") from None
    console.print(summary(verdicts))
    show(console, f"report  {folder / 'report.html'}")


def _command(folder: Path) -> str:
    """The command line for the run record, with --out, so that --resume can be added to it."""
    command = command_line()
    if not any(word == "--out" or word.startswith("--out=") for word in sys.argv):
        command += f" --out {shlex.quote(str(folder))}"
    return command.encode(errors="surrogateescape").decode(errors="replace")  # a path need not be text
