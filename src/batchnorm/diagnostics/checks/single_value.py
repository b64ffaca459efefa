"""BN401: one value per channel."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

from torch import Tensor, nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.estimate import population


class SingleValue(Check):
    code = "BN401"
    name = "single-value"
    severity = "error"
    symptom = (
        "ValueError: Expected more than 1 value per channel when training; often at the end of an epoch."
    )
    why = "One value has no variance: a last batch of one example, or a branch that pools to 1 × 1 with a batch of one."
    source = "pytorch-semseg #214; fastai #1352; ISBNet #12"
    needs = ("measured",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        measured = subject.measured
        for path, number in measured.single.items():
            yield self.finding(
                path,
                f"batch {number} gives it one value per channel, which has no variance: training fails there",
                'drop_last=True, larger batches, or bn.configure(model, on_single="running")',
                batch=number,
                examples=measured.sizes[number],
            )
        last = _last_batch(subject.loader)
        if last != 1 or measured.single:
            return
        for path, found in measured.layers.items():
            if all(each.count == each.samples for each in found.arrivals):
                yield self.finding(
                    path,
                    "the loader's last batch has one example, which gives it one value per channel: training fails",
                    'drop_last=True, or bn.configure(model, on_single="running")',
                    examples=1,
                )

    def plant(self, case: Case) -> None:
        """By a layer behind a pooling to 1 × 1, in a last batch of one example."""
        channels = case.layer.num_features
        case.replace(
            case.path,
            nn.Sequential(case.layer, Pooled(channels)),
        )
        case.path = f"{case.path}.1.norm"
        population(case.model, case.batches)
        case.optimizer.add_param_group({"params": [*case.layer.parameters()], "weight_decay": 0.0})
        case.batches = [*case.batches[:3], case.batches[0][:1]]


class Pooled(nn.Module):
    """A branch as in DeepLab's: its average, 1 × 1, normalised and added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.constant_(self.norm.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.norm(self.conv(x.mean((2, 3), keepdim=True)))
        return x + added


def _last_batch(loader: Any) -> int | None:
    """How many examples the last batch of a DataLoader has, where that can be known without reading it."""
    size, data = getattr(loader, "batch_size", None), getattr(loader, "dataset", None)
    if not size or getattr(loader, "drop_last", True) or not isinstance(data, Sized):
        return None
    sampler = getattr(loader, "sampler", None)
    number = len(sampler) if isinstance(sampler, Sized) else len(data)
    return int(number % size or size)
