"""BN304: layers that have seen other numbers of batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import batches_tracked
from batchnorm.diagnostics.subject import Subject


class CountsDiffer(Check):
    code = "BN304"
    name = "counts-differ"
    severity = "warning"
    symptom = "Some layers have tracked twice the batches of the rest, or a few."
    why = (
        "In a plain training every layer sees every batch. One that counts a multiple is updated again each step "
        "(checkpointing, a second call); one that counts less is in a branch, was frozen for a time, or was put in "
        "later."
    )
    source = "pytorch #96136, #62471; fairscale #1035"
    yields_to = ("BN206", "BN207", "BN212", "BN214", "BN303", "BN108")

    def find(self, subject: Subject) -> Iterator[Finding]:
        counts = {path: batches_tracked(layer) for path, layer in subject.learning.items()}
        known = {path: count for path, count in counts.items() if count}
        if len(known) < 3:
            return
        usual, number = Counter(known.values()).most_common(1)[0]
        if number <= len(known) / 2:
            return
        for path, count in known.items():
            if count >= 2 * usual:
                yield self.finding(
                    path,
                    f"has tracked {count:,} batches, {number} of {len(known)} layers {usual:,}: "
                    f"{count / usual:g} updates a step",
                    "look for checkpointing or a second call; bn.upgrade(model) counts a step once",
                    batches=count,
                    usual=usual,
                )

    def plant(self, case: Case) -> None:
        case.layer.num_batches_tracked.mul_(2)
