"""`batchnorm train`: a network from a run.toml, on one machine or, under torchrun, on many."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchnorm.cli.run_settings import newest_run
from batchnorm.cli.terminal import Failure, as_failure, command_line, new_folder, show, words

if TYPE_CHECKING:
    from rich.console import Console

    from batchnorm.records import Result
    from batchnorm.training.config import Config

# The exit code of a run that was stopped by SIGTERM (EX_TEMPFAIL of sysexits.h, on which schedulers restart it).
TERMINATED = 75

EXAMPLE = """\
[model]
name = "bn-inception"        # or a classification model of torchvision, "resnet18" say, without the two keys below
width = 0.25
stem = "small"               # "imagenet" for images of 224 pixels

[data]
source = "fashion-mnist"     # or a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or with train-*.tar, val-*.tar
image_size = 28

[optimizer]
rate = 0.02
decay_every = 20             # steps, after each of which the rate is 4 % lower

[training]
steps = 2000
batch_size = 32              # over all processes

[evaluation]
every = 500                  # steps; unless given, an epoch
"""

EPILOG = (
    "[bold]Examples[/]\n\n"
    "batchnorm train --example > run.toml                     write an example\n\n"
    "batchnorm train run.toml                                 train; Ctrl-C loses nothing\n\n"
    "batchnorm train run.toml --set optimizer.rate=0.05       change a key\n\n"
    "batchnorm train run.toml --recipe bn-x5                  with the paper's changes, which are printed\n\n"
    "batchnorm train --resume                                 resume the newest run that was stopped\n\n"
    "torchrun --nproc-per-node 2 -m batchnorm.cli train run.toml --out runs/both     two processes\n\n"
    "[bold]Exit codes[/]\n\n"
    "0 done · 1 error · 75 stopped by SIGTERM with a checkpoint · 130 stopped by Ctrl-C with a checkpoint"
)


def train(
    config: Annotated[
        Path | None,
        typer.Argument(help="A run.toml; to resume a run it may be left out.", dir_okay=False),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of run.toml; repeatable."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Change the run as in the paper: inception, bn-baseline, bn-x5, bn-x30, bn-x5-sigmoid. "
            "Every change is printed. The run.toml is that of inception; the others multiply its rate."
        ),
    ] = None,
    without: Annotated[
        str | None,
        typer.Option(help="Steps of the recipe to leave out, by their numbers in section 4.2.1: 2,7."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="The run's folder.", show_default="runs/train-DATE-TIME"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Resume the run in --out (or start it if it has not begun), or the newest one."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration and do not train.")
    ] = False,
    example: Annotated[bool, typer.Option("--example", help="Print an example of run.toml.")] = False,
) -> None:
    """Train a network, with evaluations during training and checkpoints for --resume.

    The folder holds records.jsonl, checkpoints, TensorBoard events and
    report.html. Evaluations use the population statistics of Algorithm 2;
    at the end the accuracy with the moving averages is reported too.
    """
    if example:
        typer.echo(EXAMPLE, nl=False)
        return
    with _exit_on_sigterm():
        _train(config, changes, recipe, without, out, resume, dry_run)


def _train(
    config: Path | None,
    changes: list[str] | None,
    recipe: str | None,
    without: str | None,
    out: Path | None,
    resume: bool,
    dry_run: bool,
) -> None:
    from rich.console import Console

    from batchnorm.training import toml
    from batchnorm.training.config import Config
    from batchnorm.training.toml import ConfigError

    console = Console(quiet=_rank() > 0)
    with as_failure(ConfigError):
        folder = _folder(out, resume)
        previous = _previous_config(folder, resume)
        if previous is not None and config is None:
            run_config = toml.parse(previous.model_dump(mode="json"), changes or ())
        elif config is not None:
            run_config = toml.read(config, changes or ())
        else:
            raise Failure("name a run.toml; batchnorm train --example prints an example")
        if recipe is not None:
            run_config = _apply_recipe(console, run_config, recipe, without)
        elif without is not None:
            raise Failure("--without leaves out steps of a recipe: name it, --recipe bn-x5")
    if previous is not None and (changed := toml.differences(previous, run_config)):
        raise Failure(f"{', '.join(changed)} cannot change when a run is resumed; start a new run for that")
    if dry_run:
        show(console, Config.model_dump_json(run_config, indent=2))
        return
    _run(console, run_config, folder)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Exit immediately on SIGTERM during the imports, which take seconds; a Session installs its own handler."""
    previous = signal.signal(signal.SIGTERM, lambda *_: os._exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _folder(out: Path | None, resume: bool) -> Path:
    if out is None and _ranks() > 1:
        raise Failure("name a folder that all processes share: --out runs/NAME")
    return out or (newest_run("train") if resume else new_folder("train"))


def _has_begun(folder: Path) -> bool:
    """Whether there is a run in `folder` with at least its first record."""
    path = folder / "records.jsonl"
    return path.is_file() and b"\n" in path.read_bytes()


def _previous_config(folder: Path, resume: bool) -> Config | None:
    """The configuration of the run in `folder` to resume; None if no run has begun."""
    from batchnorm.records import RecordError, Run, read
    from batchnorm.training import toml

    if not _has_begun(folder):
        return None
    if not resume:
        if (
            _rank() > 0
        ):  # the main process may have begun the run already, and reports the error if it has not
            return None
        raise Failure(f"{folder} holds a run already: add --resume to resume it, or choose another --out")
    with as_failure(RecordError):
        head = next(read(folder / "records.jsonl"), None)
    if not isinstance(head, Run) or head.experiment != "train":
        raise Failure(f"{folder} does not hold a run of batchnorm train")
    return toml.parse(head.config)


def _apply_recipe(console: Console, config: Config, recipe: str, without: str | None) -> Config:
    from batchnorm.training import recipe as recipes

    numbers = words(without) if without else ()
    if not all(number.isdecimal() for number in numbers):
        raise Failure(f"--without {without}: name steps by their numbers in section 4.2.1, as in 2,7")
    try:
        config, applied = recipes.apply(config, recipe, [int(number) for number in numbers])
    except ValueError as error:
        raise Failure(str(error)) from None
    for change in applied:
        console.print(str(change), style=None if change.changed else "dim", markup=False, highlight=False)
    return config


def _run(console: Console, config: Config, folder: Path) -> None:
    from batchnorm.data.idx import DataError
    from batchnorm.records import RecordError
    from batchnorm.training.checkpoint import CheckpointError
    from batchnorm.training.network import NetworkError
    from batchnorm.training.progress_bar import Bar
    from batchnorm.training.session import Diverged, Session, Stopped
    from batchnorm.training.toml import ConfigError

    command = command_line()
    if not any(word == "--out" or word.startswith("--out=") for word in sys.argv):
        command += f" --out {shlex.quote(str(folder))}"
    show(console, f"run folder  {folder}")
    try:
        with (
            as_failure(ConfigError, DataError, RecordError, CheckpointError, NetworkError, Diverged),
            _write_errors(folder),
            Bar(console) as bar,
        ):
            result = Session(config, folder, command, bar).run()
    except Stopped as stopped:
        show(console, f"Stopped. Resume with:  batchnorm train --out {shlex.quote(str(folder))} --resume")
        raise typer.Exit(TERMINATED if stopped.signal == signal.SIGTERM else 130) from None
    show(console, _summary(result))
    show(console, f"report  {folder / 'report.html'}")


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError, such as a full disk, into a Failure with the command to resume."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise Failure(
            f"{where}: {error.strerror or error}; the checkpoints in {folder} are intact: when that is fixed, "
            f"resume with --out {shlex.quote(str(folder))}{' --resume' * _has_begun(folder)}"
        ) from None


def _summary(result: Result) -> str:
    moving = "" if result.accuracy_moving is None else f" ({result.accuracy_moving:.2%} by moving averages)"
    return f"{result.accuracy:.2%} of the validation images right after {result.steps:,} steps{moving}"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
