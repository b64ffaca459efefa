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
from batchnorm.cli.terminal import Failure, command_line, in_one_line, new_folder, show, words

if TYPE_CHECKING:
    from rich.console import Console

    from batchnorm.records import Result
    from batchnorm.training.config import Config

# A run that was asked to go by SIGTERM leaves with this code (EX_TEMPFAIL of sysexits.h, which schedulers
# take as: start it again).
TERMINATED = 75

EXAMPLE = """\
[model]
name = "bn-inception"        # or any classification model of torchvision: "resnet18", ...
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
    "batchnorm train --example > run.toml                     a file to begin with\n\n"
    "batchnorm train run.toml                                 train; Ctrl-C loses nothing\n\n"
    "batchnorm train run.toml --set optimizer.rate=0.05       change a key\n\n"
    "batchnorm train run.toml --recipe bn-x5                  with the paper's changes, and say which\n\n"
    "batchnorm train --resume                                 go on with the newest run that was stopped\n\n"
    "torchrun --nproc-per-node 2 -m batchnorm.cli train run.toml --out runs/both     two processes\n\n"
    "[bold]Exit codes[/]\n\n"
    "0 done · 1 an error · 75 stopped by SIGTERM, a checkpoint was written · 130 the same by Ctrl-C"
)


def train(
    config: Annotated[
        Path | None,
        typer.Argument(help="A run.toml; when a run is continued, that run's own.", dir_okay=False),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of run.toml; may be repeated."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Change the run as the paper does: inception, bn-baseline, bn-x5, bn-x30, bn-x5-sigmoid. "
            "Every change is printed. The run.toml is that of inception, whose rate the others multiply."
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
            "--resume", help="Go on with the run in --out (one that has not begun begins), or the newest."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run would be, and do not train.")
    ] = False,
    example: Annotated[bool, typer.Option("--example", help="Print a run.toml to begin with.")] = False,
) -> None:
    """Train a network, evaluate it as it goes, and keep checkpoints from which --resume continues.

    The folder holds records.jsonl, checkpoints, TensorBoard events and
    report.html. In evaluations BN takes the population statistics of
    Algorithm 2; at the end the moving averages' accuracy stands beside it.
    """
    if example:
        typer.echo(EXAMPLE, nl=False)
        return
    with _leaving_at_once():
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
    with in_one_line(ConfigError):
        folder = _folder(out, resume)
        before = _before(folder, resume)
        if before is not None and config is None:
            wanted = toml.parse(before.model_dump(mode="json"), changes or ())
        elif config is not None:
            wanted = toml.read(config, changes or ())
        else:
            raise Failure("name a run.toml; batchnorm train --example prints one to begin with")
        if recipe is not None:
            wanted = _by_recipe(console, wanted, recipe, without)
        elif without is not None:
            raise Failure("--without leaves out steps of a recipe: name it, --recipe bn-x5")
    if before is not None and (changed := toml.differences(before, wanted)):
        raise Failure(f"{', '.join(changed)} cannot change when a run is continued; start a new run for that")
    if dry_run:
        show(console, Config.model_dump_json(wanted, indent=2))
        return
    _run(console, wanted, folder)


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """SIGTERM while there is nothing to save, as the imports take seconds; a session listens by itself."""
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _folder(out: Path | None, resume: bool) -> Path:
    if out is None and _ranks() > 1:
        raise Failure("name a folder that all processes share: --out runs/NAME")
    return out or (newest_run("train") if resume else new_folder("train"))


def _begun(folder: Path) -> bool:
    """Whether a run in `folder` came as far as its first record; killed before, it has nothing to go on with."""
    path = folder / "records.jsonl"
    return path.is_file() and b"\n" in path.read_bytes()


def _before(folder: Path, resume: bool) -> Config | None:
    """The configuration of the run in `folder` that is to go on; None where none has begun, and one is to begin."""
    from batchnorm.records import RecordError, Run, read
    from batchnorm.training import toml

    if not _begun(folder):
        return None
    if not resume:
        if _rank() > 0:  # the first process may have begun already; it is the one to complain
            return None
        raise Failure(f"{folder} holds a run already: add --resume to go on with it, or choose another --out")
    with in_one_line(RecordError):
        head = next(read(folder / "records.jsonl"), None)
    if not isinstance(head, Run) or head.experiment != "train":
        raise Failure(f"{folder} does not hold a run of batchnorm train")
    return toml.parse(head.config)


def _by_recipe(console: Console, config: Config, recipe: str, without: str | None) -> Config:
    from batchnorm.training import recipe as recipes

    numbers = words(without) if without else ()
    if not all(number.isdecimal() for number in numbers):
        raise Failure(f"--without {without}: name steps by their numbers in section 4.2.1, as in 2,7")
    try:
        config, applied = recipes.apply(config, recipe, [int(number) for number in numbers])
    except ValueError as error:
        raise Failure(str(error)) from None
    for each in applied:
        console.print(str(each), style=None if each.changed else "dim", markup=False, highlight=False)
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
            in_one_line(ConfigError, DataError, RecordError, CheckpointError, NetworkError, Diverged),
            _no_room(folder),
            Bar(console) as bar,
        ):
            result = Session(config, folder, command, bar).run()
    except Stopped as stopped:
        show(console, f"Stopped. Go on with:  batchnorm train --out {shlex.quote(str(folder))} --resume")
        raise typer.Exit(TERMINATED if stopped.signal == signal.SIGTERM else 130) from None
    show(console, _said(result))
    show(console, f"report  {folder / 'report.html'}")


@contextmanager
def _no_room(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise Failure(
            f"{where}: {error.strerror or error}; what was saved in {folder} is whole: "
            f"when that is mended, go on with --out {shlex.quote(str(folder))}{' --resume' * _begun(folder)}"
        ) from None


def _said(result: Result) -> str:
    moving = "" if result.accuracy_moving is None else f" ({result.accuracy_moving:.2%} by moving averages)"
    return f"{result.accuracy:.2%} of the validation images right after {result.steps:,} steps{moving}"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
