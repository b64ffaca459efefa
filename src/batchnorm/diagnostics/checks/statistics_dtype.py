"""BN203: running statistics in half precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from batchnorm.diagnostics.check import Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject

_BUFFERS = ("running_mean", "running_var")


class StatisticsDtype(Check):
    code = "BN203"
    name = "statistics-dtype"
    severity = "warning"
    symptom = "The running statistics of a model in 16 bits stand still after some hundred steps."
    why = (
        "model.half() and model.bfloat16() cast buffers too. A tenth of a difference is then below the precision of "
        "bfloat16 once the difference is below 3 %, and float16 overflows at a variance of 65,504."
    )
    source = "docs/numerics.md"

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, layer in subject.tracking.items():
            kinds = {str(getattr(layer, name).dtype).removeprefix("torch.") for name in _BUFFERS}
            small = kinds & {"bfloat16", "float16"}
            if small:
                kind = small.pop()
                yield self.finding(
                    path,
                    f"its running statistics are {kind}",
                    "bn.upgrade(model): ours stay float32",
                    dtype=kind,
                )

    def fix(self, model: nn.Module, finding: Finding) -> None:
        layer = model.get_submodule(finding.layer)
        for name in _BUFFERS:
            layer._buffers[name] = getattr(layer, name).float()

    def plant(self, model: nn.Module, path: str) -> None:
        layer = model.get_submodule(path)
        for name in _BUFFERS:
            layer._buffers[name] = getattr(layer, name).to(torch.bfloat16)
