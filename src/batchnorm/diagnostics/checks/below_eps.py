"""BN208: variances that eps is larger than."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.diagnostics.check import Case, Check, shown
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import statistics
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.estimate import population


class BelowEps(Check):
    code = "BN208"
    name = "below-eps"
    severity = "warning"
    symptom = "A layer that hardly normalises: its outputs stay small, the gradient through it is wrong by a factor."
    why = (
        "The variance is so much smaller than eps that x̂ = (x - mean) / sqrt(variance + eps) is far from variance 1. "
        "Where it comes from: tiny initial weights, inputs in tiny units, float16 gradients scaled away."
    )
    source = "Ioffe & Szegedy 2015, algorithm 1; docs/numerics.md"
    yields_to = ("BN406",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, layer in subject.tracking.items():
            variance = statistics(layer)[1]
            eps = float(getattr(layer, "eps", 0.0))
            alive = variance[variance > 0]
            if not alive.numel() or not bool(alive.isfinite().all()):
                continue
            middle = float(alive.median())
            if middle < 0.05 * eps:
                yield self.finding(
                    path,
                    f"the variance of its input, {shown(middle)} (median), is far below eps, {eps:g}: its outputs have "
                    f"deviations of {(middle / (middle + eps)) ** 0.5:.2f}",
                    f'larger inputs, or bn.configure(model, eps={middle / 100:.0e}, only="{path}") and train',
                    variance=middle,
                    eps=eps,
                )

    def plant(self, case: Case) -> None:
        with torch.no_grad():
            case.convolution.weight.mul_(1e-5)
        population(case.model, case.batches)
