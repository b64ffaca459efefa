"""BN210: channels that are far larger than the others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm.diagnostics.check import Case, Check, plural, shown
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import statistics
from batchnorm.diagnostics.subject import Subject


class ExplodingChannels(Check):
    code = "BN210"
    name = "exploding-channels"
    severity = "warning"
    symptom = "Loss spikes, overflow in float16, quantization that loses all but a few channels."
    why = (
        "γ, or γ / sqrt(variance + eps), of a channel is a thousand times that of the others: a variance that went to "
        "0, a rate that was too high, weights of a wrong file."
    )
    source = "docs/numerics.md; Nagel et al. 2019 (ranges of channels in quantization)"
    yields_to = ("BN202", "BN206", "BN207", "BN406")

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, layer in subject.layers.items():
            weight = getattr(layer, "weight", None)
            if weight is not None:
                yield from self._above(path, weight.detach().double().abs().flatten(), "γ", 1e3)
            if path in subject.tracking:
                variance = statistics(layer)[1]
                yield from self._above(path, variance[variance.isfinite()], "the running variance", 1e6)

    def _above(self, path: str, size: Tensor, what: str, times: float) -> Iterator[Finding]:
        some = size[size > 0]
        if not some.numel():
            return
        usual, largest = float(some.median()), float(some.max())
        if largest > times * usual:
            number = int((size > times * usual).sum())
            yield self.finding(
                path,
                f"{what} of {plural(number, 'channel')} is up to {shown(largest)}, of the others {shown(usual)}",
                "look at what made it; clip, or train on with a lower rate",
                channels=number,
                largest=largest,
                median=usual,
            )

    def plant(self, case: Case) -> None:
        with torch.no_grad():
            case.layer.weight[2] = 1e5
