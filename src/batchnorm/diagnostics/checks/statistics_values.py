"""BN202: running statistics that no data has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from batchnorm.diagnostics.check import Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class StatisticsValues(Check):
    code = "BN202"
    name = "statistics-values"
    severity = "error"
    symptom = "Evaluation gives nan or huge numbers, while training goes on."
    why = (
        "A batch with inf or nan makes torch's running statistics nan for good; E[x²] - E[x]² in float32, or an "
        "average of a wrong file, makes variances negative, whose root is nan."
    )
    source = "pytorch #88474, #90342, #96798, #115500"

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, layer in subject.tracking.items():
            mean, variance = layer.running_mean, layer.running_var
            assert mean is not None and variance is not None
            lost = int((~(mean.isfinite() & variance.isfinite())).sum())
            negative = int((variance < 0).sum())
            again = "bn.population(model, batches)"
            if lost:
                yield self.finding(
                    path, f"{lost} of its channels have statistics that are not finite", again, channels=lost
                )
            if negative:
                yield self.finding(
                    path, f"{negative} of its variances are negative", again, channels=negative
                )

    def plant(self, model: nn.Module, path: str) -> None:
        variance = model.get_submodule(path).running_var
        assert isinstance(variance, torch.Tensor)
        variance[0] = float("nan")
