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
    """An error that the user can fix; printed in one line, without a traceback."""


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


def show(console: Console, text: str) -> None:
    """Print `text` without rich's markup, highlighting and wrapping, which would change paths."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
