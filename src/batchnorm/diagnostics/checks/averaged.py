"""BN215: averaged weights with statistics of others."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import averages, batches_tracked
from batchnorm.diagnostics.subject import Subject


class Averaged(Check):
    code = "BN215"
    name = "averaged-weights"
    severity = "warning"
    symptom = "The EMA or SWA model is far worse in evaluation than the model that is trained."
    why = (
        "torch's AveragedModel averages parameters and takes the buffers of the last model: statistics of other "
        "weights than its own, unless update_bn or population has measured them since."
    )
    source = "composer #624; ema-pytorch #29; timm #245, #106"
    yields_to = ("BN206", "BN207", "BN405")

    def find(self, subject: Subject) -> Iterator[Finding]:
        paths = {module: path for path, module in subject.model.named_modules()}
        for module in averages(subject.model):
            path, number = paths[module], int(module.n_averaged)
            layers = [each for each in subject.learning.values() if each in set(module.modules())]
            if not layers:
                continue
            measured = any(bool(batches_tracked(layer)) for layer in layers)
            yield self.finding(
                path,
                f"averages {number} models, and has the running statistics of "
                + ("the last, unless they were measured since" if measured else "none"),
                "bn.population(averaged, batches), or bn.average(model) in its place",
                severity="info" if measured else "warning",
                models=number,
            )

    def plant(self, case: Case) -> None:
        case.model = torch.optim.swa_utils.AveragedModel(case.model)
        case.model.n_averaged.fill_(10)
        case.optimizer = None
        for each in case.model.modules():
            if hasattr(each, "reset_running_stats"):
                each.reset_running_stats()
        case.path = ""
