"""`batchnorm reproduce`: an experiment of the paper, from its options to the report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from batchnorm.cli import settings
from batchnorm.cli.terminal import Failure, command_line, in_one_line, new_folder, show, words

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
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="How many seeds, 0, 1, ..., the verdict averages over.", show_default="3"),
    ] = None,
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
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in --out, or with the newest one, to the same numbers."
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Networks trained at the same time.", show_default="one a core")
    ] = None,
) -> None:
    """The handwritten digits of section 4.1 and figure 1: the same network with and without batch normalization.

    Trains 784-100-100-100-10 sigmoid networks on binary 28×28 digits in batches of 60 and writes a folder with
    records.jsonl, TensorBoard events, figures and report.html. Ctrl-C loses nothing: --resume goes on.
    """
    from batchnorm.experiments.mnist import claim_names, claim_title

    if claims == "list":
        for name in claim_names():
            typer.echo(f"{name:24} {claim_title(name)}")
        return
    chosen: dict[str, Any] = {
        "data": data,
        "steps": steps,
        "seeds": seeds,
        "rate": rate,
        "init_std": init_std,
        "claims": claims and (claim_names() if claims == "all" else words(claims)),
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    folder = out or (settings.newest_run("mnist") if resume else new_folder("mnist"))
    _run(folder, chosen, resume, workers)


def _run(folder: Path, chosen: dict[str, Any], resume: bool, workers: int | None) -> None:
    from rich.console import Console

    from batchnorm.data.digits import Digits
    from batchnorm.data.idx import DataError
    from batchnorm.experiments.mnist import mnist_experiment
    from batchnorm.experiments.progress import Display, summary
    from batchnorm.experiments.run import Stopped
    from batchnorm.records import RecordError
    from batchnorm.training.checkpoint import CheckpointError
    from batchnorm.training.workers import WorkerDied

    console = Console()
    go_on = f"batchnorm reproduce mnist --out {shlex.quote(str(folder))} --resume"
    with in_one_line(DataError, RecordError, CheckpointError):
        wanted = settings.read_from(folder, chosen) if resume else settings.chosen_for(folder, chosen)
        # what is wrong with the data is said here, in one line, and not by a worker
        experiment = mnist_experiment(wanted, Digits.load(wanted.data))
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
