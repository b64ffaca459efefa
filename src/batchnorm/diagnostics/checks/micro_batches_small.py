"""BN308: gradients of small batches, accumulated."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.checks.two_domains import FAR
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class SmallMicroBatches(Check):
    code = "BN308"
    name = "small-micro-batches"
    severity = "warning"
    symptom = "Accumulating 16 batches of 2 is not as good as a batch of 32."
    why = (
        "The gradients are averaged, the statistics are not: each micro-batch is normalised by its own few values, and "
        "the running statistics move once for each."
    )
    source = "pytorch #46516; GradientAccumulator #6, #47; keras #16633; super-gradients #1858"
    needs = ("steps",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        assert subject.steps is not None
        steps = {
            path: each
            for path, each in subject.steps.layers.items()
            if path in subject.learning and each.calls
        }
        if not steps or any(each.usual_calls < 2 or each.ratio > FAR for each in steps.values()):
            return
        each = next(iter(steps.values()))
        number = each.usual_calls
        yield self.finding(
            "",
            f"{number} batches of {each.samples} examples are accumulated in a step, and each is normalised by itself",
            "bn.virtual_batch(model, ...) normalises them as one batch; larger micro-batches; bn.Renorm()",
            severity="warning" if each.samples < 16 else "info",
            batches=number,
            examples=each.samples,
        )

    def plant(self, case: Case) -> None:
        case.path = ""
        case.options["passes"] = 4
        case.batches = [batch[:8] for batch in case.batches]
