"""BN203: running statistics in half precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.diagnostics.check import Case, Check
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
            small = sorted(kinds - {"float32", "float64"})
            if small:
                yield self.finding(
                    path,
                    f"its running statistics are {small[0]}",
                    "layer.running_mean.data = layer.running_mean.float(), running_var likewise; bn.upgrade(model) "
                    "keeps them so",
                    dtype=small[0],
                )

    def fix(self, subject: Subject, finding: Finding) -> str:
        layer = subject.layers[finding.layer]
        for name in _BUFFERS:
            layer._buffers[name] = getattr(layer, name).float()
        return f"running statistics {finding.evidence['dtype']} → float32"

    def plant(self, case: Case) -> None:
        for name in _BUFFERS:
            case.layer._buffers[name] = getattr(case.layer, name).to(torch.bfloat16)
