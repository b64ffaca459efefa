"""The commands of `batchnorm`. They import torch when they run, so that `--help` is fast."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli import deployment, doctor, evaluate, insert, merge, population_statistics, predict, train
from batchnorm.cli.lazy import lazy_app
from batchnorm.cli.terminal import Failure

app = typer.Typer(
    help="Batch Normalization for PyTorch: see the paper's claims hold, each by one command.",
    epilog="Start here:  batchnorm reproduce mnist",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
app.add_typer(
    lazy_app(
        "batchnorm.cli.reproduce",
        help="Reproduce an experiment of the paper (Ioffe & Szegedy 2015).",
        no_args_is_help=True,
    ),
    name="reproduce",
)
app.add_typer(
    lazy_app(
        "batchnorm.cli.bench",
        help="Measure speed on this machine: our layers, torch's, and a copy, interleaved.",
        epilog="[bold]Examples[/]\n\n"
        "batchnorm bench kernels         layers, forward and backward, 3 min\n\n"
        "batchnorm bench step            training steps of known networks, 8 min\n\n"
        "batchnorm bench infer           layers and networks in evaluation, 3 min\n\n"
        "batchnorm bench memory          the memory of a training step, 6 min\n\n"
        "batchnorm bench fold            folded networks, also in ONNX Runtime, 6 min\n\n"
        "batchnorm bench statistics      Sync, Ghost, masks and others, 3 min\n\n"
        "batchnorm bench scaling         Sync over 1, 2 and 4 processes, 4 min\n\n"
        "batchnorm bench all --quick     a test that all of it runs, in seconds",
        no_args_is_help=True,
        rich_markup_mode="rich",
    ),
    name="bench",
)
app.command("train", epilog=train.EPILOG)(train.train)
app.command("predict", epilog=predict.EPILOG, no_args_is_help=True)(predict.predict)
app.command("examine", epilog=doctor.EPILOG, no_args_is_help=True)(doctor.examine)
app.command("explain", epilog=doctor.EXPLAIN_EPILOG, no_args_is_help=True)(doctor.explain)
app.command("insert", epilog=insert.EPILOG, no_args_is_help=True)(insert.insert)
app.command("population", epilog=population_statistics.EPILOG, no_args_is_help=True)(
    population_statistics.population
)
app.command("merge", epilog=merge.EPILOG, no_args_is_help=True)(merge.merge)
app.command("fold", epilog=deployment.FOLD_EPILOG, no_args_is_help=True)(deployment.fold)
app.command("export", epilog=deployment.EXPORT_EPILOG, no_args_is_help=True)(deployment.export)
app.command("evaluate", epilog=evaluate.EPILOG, no_args_is_help=True)(evaluate.evaluate)


@app.command(
    "report",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm report runs/NAME\n\n"
    "batchnorm report runs/*      of every run there",
    no_args_is_help=True,
)
def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="Folders of runs, each with its records.jsonl.", show_default=False
        ),
    ],
) -> None:
    """Rebuild the figures and report.html of runs from their records.jsonl; does not need torch."""
    from rich.console import Console
    from rich.progress import track

    from batchnorm import report
    from batchnorm.records import RecordError

    console = Console(stderr=True)
    wrong = []
    for run in runs:
        try:
            page = report.build(
                run,
                lambda charts: track(
                    charts, "drawing", console=console, transient=True, disable=not console.is_terminal
                ),
            )
        except (RecordError, OSError) as error:
            wrong.append(str(error))
            continue
        typer.echo(page)
    if wrong:
        raise Failure("\n       ".join(wrong))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    if version:
        from batchnorm import __version__

        typer.echo(f"batchnorm {__version__}")
        raise typer.Exit


def run() -> None:
    """The `batchnorm` command, where the packages it needs are installed."""
    for stream in (sys.stdout, sys.stderr):  # a locale without × must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        _recorded(app)()
    except Failure as failure:
        typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(str(failure), err=True)
        sys.exit(failure.status)


def _recorded(command: Callable[[], object]) -> Callable[[], object]:
    """`command`; under torchrun its error is written where torchrun looks for it, to print it last.

    Of a `Failure` the message alone: an error of the user's needs no list of calls.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return command
    from torch.distributed.elastic.multiprocessing.errors import record

    def run_command() -> Failure | None:
        try:
            command()
        except Failure as failure:
            return failure
        return None

    def recorded() -> None:
        if (failure := record(run_command)()) is not None:
            Path(file).write_text(json.dumps({"message": str(failure), "timestamp": str(int(time.time()))}))
            raise failure

    return recorded
