"""BN503: synchronized layers without anybody to synchronize with."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import is_synchronized
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.convert_sync import convert_sync


class SyncAlone(Check):
    code = "BN503"
    name = "sync-alone"
    severity = "warning"
    symptom = "SyncBatchNorm fails on a CPU, in a test, or after the training."
    why = (
        "There is one process only: torch's SyncBatchNorm is then a plain layer that is slower on a GPU and refuses a "
        "CPU, and tools that look for BatchNorm2d do not find it."
    )
    source = "pytorch #41081; PRs #78078, #78081; mmsegmentation #2147; mmagic #133"
    yields_to = ("BN504",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return
        for path, layer in subject.layers.items():
            if is_synchronized(layer):
                yield self.finding(
                    path,
                    f"is synchronized ({type(layer).__name__}), and there is one process",
                    "model, _ = bn.convert_sync(model, revert=True)",
                )

    def plant(self, case: Case) -> None:
        if type(case.layer) is nn.BatchNorm2d:
            case.replace(case.path, nn.SyncBatchNorm.convert_sync_batchnorm(case.layer))
        else:  # torch's converter would drop an activation
            case.replace(case.path, convert_sync(case.layer)[0])
