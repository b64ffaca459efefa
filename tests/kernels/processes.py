"""A Python process of its own, for what is decided once a process or could end it."""

import os
import tempfile
import textwrap
from pathlib import Path

from tests.forked import Forked

# An installation without the compiled module.
WITHOUT_NATIVE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "batchnorm.kernels._native":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""


def said(code: str, kernels: str | None = None) -> str:
    """What `code` prints, with `kernels` in BATCHNORM_KERNELS; an error or a signal fails the test."""
    env = {name: value for name, value in os.environ.items() if name != "BATCHNORM_KERNELS"}
    if kernels is not None:
        env["BATCHNORM_KERNELS"] = kernels
    with tempfile.TemporaryDirectory() as folder:
        process = Forked(_execute, textwrap.dedent(code), out=Path(folder) / "said", env=env)
        status = process.join()
        assert status == 0, f"ended with {status}\n{process.err}"
        return process.out.strip()


def _execute(code: str) -> None:
    exec(compile(code, "<a test's process>", "exec"), {"__name__": "__main__"})
