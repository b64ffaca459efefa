"""`batchnorm` as a user calls it: in a process of its own, or in this one, where torch is imported already."""

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from batchnorm import cli

COMMAND = [sys.executable, "-m", "batchnorm.cli"]


class Done(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    error: str


Here = Callable[..., Done]


def batchnorm(*arguments: object, cwd: Path | None = None) -> Done:
    """In a process of its own, which takes seconds to start."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=900, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def in_this_process(*arguments: object, cwd: Path | None = None) -> Done:
    """The same in this one; whatever it ends with."""
    code: object = 0
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(sys, "argv", ["batchnorm", *map(str, arguments)])
        patch.setenv("COLUMNS", "80")
        if cwd is not None:
            patch.chdir(cwd)
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    assert "Traceback" not in out.getvalue() + error.getvalue()
    return Done(code if isinstance(code, int) else int(code is not None), out.getvalue(), error.getvalue())
