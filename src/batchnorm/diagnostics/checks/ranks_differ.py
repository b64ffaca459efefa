"""BN501: processes with other buffers."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class RanksDiffer(Check):
    code = "BN501"
    name = "ranks-differ"
    severity = "warning"
    symptom = "The score depends on the rank that evaluates, or that saves the checkpoint."
    why = (
        "Each process moves its own running statistics by its own batches. DDP broadcasts rank 0's before a forward "
        "(broadcast_buffers=True); with False, or after the last step, they differ."
    )
    source = "pytorch #13711; timm #110; fvcore #152"
    needs = ("ranks",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path in subject.tracking:
            different = {each.get(path) for each in subject.ranks}
            if len(different) > 1:
                yield self.finding(
                    path,
                    f"its running statistics differ between {len(subject.ranks)} processes",
                    "bn.reduce_statistics(model), before evaluation and before a checkpoint",
                    ranks=len(subject.ranks),
                )

    def plant(self, case: Case) -> None:
        """Only where there are several processes: the tests have their own."""
        raise NotImplementedError
