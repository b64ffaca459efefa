"""The command line. Commands import torch when they run, so that `--help` is fast.

commands    the program: its commands, and those of two words
train       run.toml -> a trained network, its records and checkpoints
evaluate    networks -> accuracy of each and of their ensemble
predict     a network, images -> their classes
deployment  fold, export: a network (named_model) -> its folded weights, or a file for another runtime
reproduce   options -> settings (run_settings) -> an experiment's run -> report
bench       options -> results (measurement) -> tables, figure, page
terminal, network_options and model_options are shared: error messages, options of a trained network, and options from
the fields of settings; lazy: imports on demand
"""

from __future__ import annotations

import sys

from batchnorm.requirements import install_command, old_torch

# What each extra of pyproject.toml brings, by the names that are imported.
EXTRAS = {
    "cli": ("jinja2", "markupsafe", "matplotlib", "numpy", "pydantic", "rich", "typer"),
    "train": ("PIL", "accelerate", "tensorboard", "tomli_w", "torchvision"),
    "export": ("onnx", "onnxruntime", "onnxscript", "safetensors"),
}


def main() -> None:
    """The `batchnorm` command; a package that is not installed, or too old a torch, is an error of one line.

    Any other failing import is a bug, and keeps its traceback.
    """
    needs_torch = sys.argv[1:] and not {"report", "-h", "--help", "--version"} & {*sys.argv[1:]}
    if needs_torch and (problem := old_torch()):
        sys.exit(f"error: {problem}")
    try:
        from batchnorm.cli.commands import run

        run()
    except ModuleNotFoundError as error:
        needed = {"": ("torch",), **EXTRAS}
        extra = next((extra for extra, packages in needed.items() if error.name in packages), None)
        if extra is None:
            raise
        sys.exit(f"error: this needs {error.name}, which is not installed: {install_command(extra)}")
