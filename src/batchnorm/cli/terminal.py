"""What the commands share: how they name options and folders, print, and fail."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    Model = TypeVar("Model", bound=BaseModel)

_Value = TypeVar("_Value")

RUNS = Path("runs")


class Failure(Exception):
    """An error that the user can fix; printed in one line, without a traceback."""

    status = 1


@contextmanager
def as_failure(*expected: type[Exception]) -> Iterator[None]:
    """Turn the `expected` errors, whose messages are sufficient, into a `Failure`."""
    try:
        yield
    except expected as error:
        raise Failure(str(error)) from None


def from_options(model: type[Model], values: dict[str, Any]) -> Model:
    """A `model` with these values; an invalid one is a `Failure` that names the option."""
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise Failure(f"{option(str(first['loc'][0]))}: {first['msg']}") from None


def option(field: str) -> str:
    """The name of the option for `field`."""
    return f"--{field.replace('_', '-')}"


def words(text: str) -> tuple[str, ...]:
    """The comma-separated parts of an option's value."""
    return tuple(text.replace(" ", "").split(","))


def new_folder(kind: str) -> Path:
    """The default folder of a run that starts now."""
    return RUNS / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"


def command_line() -> str:
    """The command line as the user typed it."""
    return shlex.join(["batchnorm", *sys.argv[1:]])


def show(console: Console, text: str, style: str | None = None) -> None:
    """Print `text` without rich's markup, emoji, highlighting and wrapping, which would change paths."""
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def one_of(choices: Iterable[_Value], value: object, name: str) -> _Value:
    """The choice that equals `value`; another value is a `Failure` that names the option `name`."""
    for choice in choices:
        if choice == value:
            return choice
    raise Failure(f"{name} {value}: choose {' or '.join(map(str, choices))}")


@contextmanager
def image_bar(console: Console, images: int, networks: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with images/s and remaining time; yields its advance function. Hidden without a terminal."""
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.speed or 0.0
            return Text(f"{speed:,.{0 if speed >= 10 else 2}f} images/s" if speed else "")

    of = f"{networks} × {images:,} images" if networks > 1 else f"{images:,} images"
    progress = Progress(
        BarColumn(bar_width=20),
        TextColumn("{task.completed:,}" + f" of {of}"),
        Speed(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = progress.add_task("", total=images * networks)
    with progress:
        yield lambda done: progress.advance(task, done)
