"""What the commands share: how they name options and folders, print, and fail."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    Model = TypeVar("Model", bound=BaseModel)

RUNS = Path("runs")


class Failure(Exception):
    """What the user can put right; shown in one line, without a traceback."""


@contextmanager
def in_one_line(*expected: type[Exception]) -> Iterator[None]:
    """Turn errors whose message says all there is to know into a `Failure`."""
    try:
        yield
    except expected as error:
        raise Failure(str(error)) from None


def from_options(model: type[Model], values: dict[str, Any]) -> Model:
    """A `model` of these values; one that it does not take is a `Failure` that names the option."""
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise Failure(f"{option(str(first['loc'][0]))}: {first['msg']}") from None


def option(field: str) -> str:
    """The option that sets `field`."""
    return f"--{field.replace('_', '-')}"


def words(text: str) -> tuple[str, ...]:
    """The parts of an option's value that are separated by commas."""
    return tuple(text.replace(" ", "").split(","))


def new_folder(kind: str) -> Path:
    """Where a run that starts now goes, unless told."""
    return RUNS / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"


def command_line() -> str:
    """What the user typed, to be typed again."""
    return shlex.join(["batchnorm", *sys.argv[1:]])


def show(console: Console, text: str) -> None:
    """Print `text` as it is: a path may hold what rich would take for markup, or for a line to break."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
