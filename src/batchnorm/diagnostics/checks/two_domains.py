"""BN307: one layer on two distributions in a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject

FAR = 16.0  # F of two batches of one distribution is above it once in 10,000 times


class TwoDomains(Check):
    code = "BN307"
    name = "two-domains"
    severity = "warning"
    symptom = "A discriminator, or a network on source and target, is good in training and bad in evaluation."
    why = (
        "Real and generated, source and target, clean and adversarial batches go through one layer in turns. Each is "
        "normalised by itself; the running statistics are a mixture that fits none."
    )
    source = "pytorch #1738, #8985; DCGAN #266; ganhacks #52; Xie et al. 2020 (AdvProp)"
    needs = ("steps",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        assert subject.steps is not None
        for path, seen in subject.steps.layers.items():
            if path in subject.learning and seen.ratio > FAR:
                yield self.finding(
                    path,
                    f"the batches of a step differ {seen.ratio:.0f} times as much as those of one distribution would",
                    'with bn.domain("real"): around each pass, one set of statistics for each',
                    ratio=seen.ratio,
                )

    def plant(self, case: Case) -> None:
        """At the layer alone, which gets other values in every second pass."""
        passes = [0]

        def shift(module: Any, given: Any) -> Any:
            passes[0] += 1
            return (given[0] * 3 + 20,) if passes[0] % 2 else None

        case.layer.register_forward_pre_hook(shift)
        case.options["passes"] = 2
