"""`batchnorm` as a user calls it: in a process of its own, or in this one, where torch is imported already."""

import subprocess
import sys
from collections.abc import Callable
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
        [*COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def in_this_process(capsys: pytest.CaptureFixture[str]) -> Here:
    """The same, to be called in a test; whatever it ends with."""

    def call(*arguments: object, cwd: Path | None = None) -> Done:
        capsys.readouterr()
        code: object = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["batchnorm", *map(str, arguments)])
            if cwd is not None:
                patch.chdir(cwd)
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Done(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)

    return call
