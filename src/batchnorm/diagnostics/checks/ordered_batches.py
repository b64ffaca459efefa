"""BN403: batches that differ more than samples do."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.measured import analysis_of_variance
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.estimate import population

_SURE = {1: 15.1, 2: 9.2, 3: 7.0, 4: 5.9, 5: 5.1, 6: 4.6, 7: 4.3}  # P(F > that) = 1e-4, by degrees of freedom


class OrderedBatches(Check):
    code = "BN403"
    name = "ordered-batches"
    severity = "warning"
    symptom = "Training goes well, and evaluation jumps with what came last: the last class, the last domain."
    why = (
        "The data are not shuffled: a batch has one class or source. Each is normalised by its own statistics, and the "
        "running ones are those of the last."
    )
    source = "pytorch #58986; docs/population.md (sorted by class)"
    needs = ("measured",)
    yields_to = ("BN404",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        measured = subject.measured
        if (
            not measured.layers or measured.live
        ):  # the weights before the first layer change from step to step
            return
        path = next(iter(measured.layers))  # what comes to the first one depends on no statistics
        first = {each.batch: each for each in reversed(measured.layers[path].arrivals)}
        arrivals = [each for each in reversed(first.values()) if each.samples > 1]
        if len(arrivals) < 2 or measured.repeated:
            return
        ratio = analysis_of_variance([each.means for each in arrivals])
        freedom = len(arrivals) - 1
        if ratio > _SURE.get(freedom, 4.0):
            yield self.finding(
                "",
                f"the means of batches differ {ratio:.1f} times as much as shuffled examples let them (at {path})",
                "shuffle=True; to measure all the same, bn.population(model, batches, estimator='pooled')",
                ratio=ratio,
                batches=len(arrivals),
            )

    def plant(self, case: Case) -> None:
        case.path = ""
        case.batches = [batch + 2.0 * number for number, batch in enumerate(case.batches)]
        population(case.model, case.batches, estimator="pooled")
