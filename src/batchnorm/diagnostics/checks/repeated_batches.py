"""BN404: the same batch again."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check, plural
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class RepeatedBatches(Check):
    code = "BN404"
    name = "repeated-batches"
    severity = "warning"
    symptom = "The network trains on a fraction of the data and overfits; its statistics are those of a few batches."
    why = (
        "Workers or ranks with one seed, a sampler without set_epoch, a loader that was made of one batch: the same "
        "examples come again within a few batches."
    )
    source = "pytorch #5059 (numpy seeds in workers)"
    needs = ("measured",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        repeated = subject.measured.repeated
        if repeated:
            again = {second for _, second in repeated}
            number = len(subject.measured.sizes)
            yield self.finding(
                "",
                f"{plural(len(again), 'batch')} of {number} came before: {repeated[0][1]} is {repeated[0][0]}",
                "a sampler that shuffles; other seeds in workers and ranks",
                severity="warning" if number > 2 else "info",
                repeated=len(again),
                batches=number,
            )

    def plant(self, case: Case) -> None:
        case.path = ""
        case.batches = [case.batches[0], *case.batches[:3]]
