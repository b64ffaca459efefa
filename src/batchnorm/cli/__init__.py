"""The command line; thin. What a command needs is imported when it runs: `--help` must not wait for torch.

commands                the program: its commands, and those of two words
train                   a run.toml -> a network, its records and checkpoints
evaluate                networks -> how often they are right, one by one and together
reproduce  settings     a new experiment, or one that was stopped   options -> an experiment's run -> report
bench      measurement  everything of one command, or of all        options -> rows -> tables, figure, page
terminal   what they share: options by name, and failing in one line
"""

from __future__ import annotations

import sys

# What each extra of pyproject.toml brings, by the names that are imported.
EXTRAS = {
    "cli": ("jinja2", "markupsafe", "matplotlib", "numpy", "pydantic", "rich", "typer"),
    "train": ("PIL", "accelerate", "tensorboard", "torchvision"),
}


def main() -> None:
    """The `batchnorm` command; a package of an extra that is not installed is an error of one line.

    Any other failing import is a bug, and keeps its traceback.
    """
    try:
        from batchnorm.cli.commands import run

        run()
    except ModuleNotFoundError as error:
        extra = next((extra for extra, packages in EXTRAS.items() if error.name in packages), None)
        if extra is None:
            raise
        sys.exit(f"error: this needs {error.name}, which is not installed: pip install 'batchnorm[{extra}]'")
