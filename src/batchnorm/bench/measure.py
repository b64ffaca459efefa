"""Measure all cases of a command, until the end or Ctrl-C."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from typing import Protocol

import torch

from batchnorm.bench import activations, deploy, infer, kernels, scaling, statistics, step
from batchnorm.bench.case import Case
from batchnorm.bench.options import Options
from batchnorm.bench.rows import Command, Measured, Row
from batchnorm.kernels import choice
from batchnorm.memory import keep_memory
from batchnorm.training.machine import machine, versions

_CASES: dict[Command, Callable[[Options], list[Case]]] = {
    "kernels": kernels.training,
    "step": step.cases,
    "memory": activations.cases,
    "infer": infer.cases,
    "fold": deploy.cases,
    "statistics": statistics.cases,
    "scaling": scaling.cases,
}

# Other packages of the comparison, if they are installed; their versions are recorded.
_OTHERS: dict[Command, tuple[str, ...]] = {
    "kernels": (),
    "step": ("torchvision",),
    "memory": ("torchvision", "inplace_abn"),
    "infer": ("torchvision",),
    "fold": ("torchvision", "timm", "onnx", "onnxscript", "onnxruntime"),
    "statistics": ("torchvision", "keras", "timm"),
    "scaling": (),
}

# Prefixes of environment variables that affect measurements; they are recorded.
_VARIABLES = ("OMP_", "MKL_", "KMP_", "MALLOC_", "GLIBC_TUNABLES", "THP_", "BATCHNORM_", "KERAS_")


class Callback(Protocol):
    """Called on the events of a measurement; the command line shows a progress bar."""

    def on_start(self, command: Command, cases: int) -> None:
        """The measurement of `cases` cases begins."""

    def on_case(self, case: str) -> None:
        """A case has begun."""

    def on_rows(self, rows: list[Row]) -> None:
        """A case has ended with these rows."""


def measure(command: Command, options: Options, line: str, callback: Callback) -> Measured:
    """Measure all cases of `command` with torch's current number of threads; Ctrl-C keeps the finished cases.

    line: the command line, for the results file.
    """
    kept = keep_memory()
    on_gpu = options.device == "cuda"
    if on_gpu:
        choice.use("triton")
    torch.manual_seed(0)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    rows: list[Row] = []
    notes: list[str] = []
    finished = False
    try:
        cases = _CASES[command](options)
        callback.on_start(command, len(cases))
        for case in cases:
            callback.on_case(case.title)
            measured, case_notes = case.measure(options.seconds, options.least)
            rows += measured
            notes += case_notes
            callback.on_rows(measured)
        finished = True
    except KeyboardInterrupt:
        pass
    return Measured(
        command=command,
        line=line,
        options=options,
        threads=torch.get_num_threads(),
        machine=machine(),
        versions=versions()
        | {name: version(name) for name in _OTHERS[command] if find_spec(name)}
        | {"kernels": f"{choice.active()} {choice.instruction_set()}".strip()}
        | ({"GPU": torch.cuda.get_device_name()} if on_gpu else {}),
        environment={
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        },
        kept_memory=kept,
        started=started,
        finished=finished,
        notes=notes,
        rows=rows,
    )
