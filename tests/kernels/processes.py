"""A Python process of its own, for what is decided once a process or could end it."""

import os
import subprocess
import sys
import textwrap

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
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, f"ended with {run.returncode}\n{run.stderr}"
    return run.stdout.strip()
