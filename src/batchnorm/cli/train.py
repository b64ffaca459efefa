"""`batchnorm train`: a network from a run.toml, on one machine or, under torchrun, on many."""

from __future__ import annotations

import json
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

    from batchnorm.records import Evaluation, Result
    from batchnorm.training.config import Config

# The exit code of a run that was stopped by SIGTERM (EX_TEMPFAIL of sysexits.h, on which schedulers restart it).
TERMINATED = 75

EXAMPLE = """\
[model]
name = "bn-inception"        # or a model of torchvision or timm, "resnet18" say, without the two keys below
width = 0.25
stem = "small"               # "imagenet" for images of 224 pixels

[data]
source = "mnist-10k"         # or "cifar-10", or a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or shards
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
    "batchnorm train run.toml --data FOLDER --dry-run         try one step, and print the whole configuration\n\n"
    "batchnorm train run.toml --recipe bn-x5                  with the paper's changes, which are printed\n\n"
    "batchnorm train --resume                                 resume the newest run that was stopped\n\n"
    "batchnorm train --resume --set training.steps=4000       and make it longer\n\n"
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
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Change a key of run.toml, or leave it out (SECTION.KEY=); repeatable.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER", help="The data set: data.source of run.toml.", show_default="run.toml's"
        ),
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
            "--resume",
            help="Resume the run in --out (or start it if it has not begun), or the newest one in this folder.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Open the data, build the network and take one step; print the whole configuration as a run.toml. "
            "Nothing is written.",
        ),
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
    if data is not None:
        changes = [*(changes or ()), f"data.source={json.dumps(data, ensure_ascii=False)}"]
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
            run_config = _apply_recipe(console, run_config, recipe, without, "# " if dry_run else "")
        elif without is not None:
            raise Failure("--without leaves out steps of a recipe: name it, --recipe bn-x5")
    if previous is not None and (changed := toml.differences(previous, run_config)):
        cosine = "training.steps" in changed
        why, too = (" (CosineAnnealingLR ends at training.steps)", "") if cosine else ("", "training.steps, ")
        raise Failure(
            f"{', '.join(changed)} cannot change when a run is resumed{why}, only {too}[machine] and [checkpoints] "
            "can; start a new run for that"
        )
    with_threads = _with_threads(console, run_config, previous, "# " if dry_run else "")
    if dry_run:
        _try(console, with_threads, run_config)
    else:
        _run(console, with_threads, folder)


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
        runs = [record for record in read(folder / "records.jsonl") if isinstance(record, Run)]
    if not runs or runs[-1].experiment != "train":
        raise Failure(f"{folder} does not hold a run of batchnorm train")
    return toml.parse(runs[-1].config)  # it may have been made longer


def _with_threads(console: Console, config: Config, previous: Config | None, comment: str) -> Config:
    """`config` with a number of threads, if it computes on a CPU and nobody has chosen one: that of the run so far."""
    import torch

    from batchnorm.training.threads import free_cores

    on_cpu = config.machine.device == "cpu" or not torch.accelerator.is_available()
    if config.machine.threads is not None or not on_cpu or "OMP_NUM_THREADS" in os.environ or _ranks() > 1:
        return config
    threads = previous.machine.threads if previous is not None else None
    if threads is None:
        threads, why = free_cores()
        show(console, f"{comment}threads     {threads}, as {why}; machine.threads chooses")
    return config.with_values("machine", threads=threads)


def _apply_recipe(console: Console, config: Config, recipe: str, without: str | None, comment: str) -> Config:
    from batchnorm.training import recipe as recipes

    numbers = words(without) if without else ()
    if not all(number.isdecimal() for number in numbers):
        raise Failure(f"--without {without}: name steps by their numbers in section 4.2.1, as in 2,7")
    try:
        config, applied = recipes.apply(config, recipe, [int(number) for number in numbers])
    except ValueError as error:
        raise Failure(str(error)) from None
    for change in applied:
        style = None if change.changed else "dim"
        show(console, f"{comment}{change}", style)
    return config


def _try(console: Console, config: Config, to_print: Config) -> None:
    """Take one step, and print the configuration as TOML, with what was found as comments.

    to_print: the same without the number of threads that suits this moment.
    """
    import time

    from batchnorm.data.idx import DataError
    from batchnorm.training import toml
    from batchnorm.training.network import NetworkError
    from batchnorm.training.session import JOB
    from batchnorm.training.toml import ConfigError
    from batchnorm.training.trainer import Trainer

    with as_failure(ConfigError, DataError, NetworkError):
        trainer = Trainer(config, JOB)
        new = trainer.load_weights()
        started = time.monotonic()
        loss = trainer.try_step()
        seconds = time.monotonic() - started
    parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
    steps = config.training.steps
    found = [
        f"{parameters:,} parameters; {len(trainer.source):,} training and {len(trainer.validation_source):,} "
        f"validation images in {trainer.source.classes} classes",
        *(f"with new weights: {name}" for name in new),
        f"one step: loss {loss:.4f}, {seconds:.2f} s; {steps:,} of them about {_duration(steps * seconds)}",
    ]
    for line in found:
        show(console, f"# {line}")
    show(console, "")
    show(console, toml.to_toml(to_print).rstrip("\n"))


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} s"


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
    show(console, _summary(result, bar.best))
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


def _summary(result: Result, best: Evaluation | None) -> str:
    """The accuracy at the end, and the best one where that is another: `evaluate` takes the best network."""
    moving = "" if result.accuracy_moving is None else f" ({result.accuracy_moving:.2%} by moving averages)"
    end = f"{result.accuracy:.2%} of the validation images right after {_steps(result.steps)}{moving}"
    if best is None or best.step == result.steps:
        return end
    return f"{end}\nbest  {best.accuracy:.2%} after {_steps(best.step)}, kept as checkpoints/best.pt"


def _steps(number: int) -> str:
    return f"{number:,} step{'s' * (number != 1)}"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
