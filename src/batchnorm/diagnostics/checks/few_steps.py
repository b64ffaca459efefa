"""BN214: too few steps for the momentum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from batchnorm.diagnostics.check import Case, Check, plural
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import batches_tracked, statistics
from batchnorm.diagnostics.subject import Missing, Subject


class FewSteps(Check):
    code = "BN214"
    name = "few-steps"
    severity = "info"
    symptom = "Bad in evaluation after a short training, better the longer it trains."
    why = (
        "After n steps the running statistics are still (1 - momentum)^n of the 0 and 1 that they began with: 90 % "
        "after 10 steps of momentum 0.01."
    )
    source = "pytorch/examples #289; docs/numerics.md (running statistics)"
    yields_to = ("BN206", "BN207")

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, layer in subject.learning.items():
            seen, momentum = batches_tracked(layer), getattr(layer, "momentum", None)
            if not seen or not momentum or momentum >= 1 or getattr(layer, "debiased", False):
                continue
            share = (1 - momentum) ** seen
            variance = statistics(layer)[1]
            # measured statistics, of bn.population or update_bn, have as few batches and nothing of the beginning
            if share < 0.05 or not bool((variance > share * 0.999).all()):
                continue
            sure = self._is_confirmed(subject, path, layer, share)
            if sure is not False:
                yield self.finding(
                    path,
                    f"after {plural(seen, 'step')} of momentum {momentum:g}, {share:.0%} of its running statistics are "
                    "the 0 and 1 that they began with" + ("" if sure else ", unless they were measured"),
                    "bn.population(model, batches), a larger momentum, or debiased=True",
                    severity="warning" if sure else "info",
                    share=share,
                    steps=seen,
                )

    @staticmethod
    def _is_confirmed(subject: Subject, path: str, layer: Any, share: float) -> bool | None:
        """Whether the statistics are nearer to such a mixture than to what the batches have; None without batches."""
        try:
            found = subject.measured
        except Missing:
            return None
        measured = found.layers.get(path)
        if measured is None or found.live:
            return None
        mean, variance = statistics(layer)
        mixed = measured.gap(mean / (1 - share), ((variance - share) / (1 - share)).clamp(min=1e-30))
        known = measured.varies
        if not bool(known.any()):
            return None
        distance, by_chance = measured.distance(layer)
        as_mixture = float(mixed[known].square().mean().sqrt())
        return distance > 0.25 and as_mixture < min(0.15 + 3 * by_chance, distance / 2)

    def fix(self, subject: Subject, finding: Finding) -> str:
        return subject.measure_again(finding.layer)

    def plant(self, case: Case) -> None:
        layer = case.layer
        layer.reset_running_stats()
        layer.momentum = 0.01
        others = [
            each for each in case.model.modules() if hasattr(each, "running_mean") and each is not layer
        ]
        case.model.train()
        for each in others:
            each.eval()
        with torch.no_grad():
            for batch in case.batches:
                case.model(batch)
        case.model.train()
