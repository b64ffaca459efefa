"""BN212: a count of batches that is no whole number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class BatchCounter(Check):
    code = "BN212"
    name = "batch-counter"
    severity = "warning"
    symptom = "An average of models, or a checkpoint, that loads with an error, or a cumulative average that is wrong."
    why = (
        "num_batches_tracked is an integer buffer. EMA and SWA code that averages every buffer makes a fraction of it, "
        "or rounds it down step by step; with momentum=None the average is weighed by it."
    )
    source = "ema-pytorch #8, #29; mmpretrain #870; ignite #2590; pytorch #8430"

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, layer in subject.tracking.items():
            count = getattr(layer, "num_batches_tracked", None)
            if not isinstance(count, Tensor):
                if getattr(layer, "momentum", 0.1) is None and path in subject.learning:
                    yield self.finding(
                        path,
                        "momentum is None, the average of all batches, and it does not count them",
                        "layer.num_batches_tracked = torch.tensor(0)",
                    )
            elif count.dtype not in (torch.int64, torch.int32):
                yield self.finding(
                    path,
                    f"num_batches_tracked is {str(count.dtype).removeprefix('torch.')}: {float(count):g}",
                    "copy integer buffers, do not average them: bn.average(model)",
                    count=float(count),
                )
            elif int(count) < 0:
                yield self.finding(
                    path,
                    f"num_batches_tracked is {int(count)}",
                    "bn.population(model, batches)",
                    count=int(count),
                )

    def fix(self, subject: Subject, finding: Finding) -> str:
        layer: Any = subject.layers[finding.layer]
        count = max(int(finding.evidence.get("count", 0)), 0)
        layer._buffers["num_batches_tracked"] = torch.tensor(count, device=layer.running_mean.device)
        return f"num_batches_tracked → {count}"

    def plant(self, case: Case) -> None:
        case.layer._buffers["num_batches_tracked"] = torch.tensor(2.5)
