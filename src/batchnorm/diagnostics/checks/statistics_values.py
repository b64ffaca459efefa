"""BN202: running statistics that no data has."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check, plural
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import statistics
from batchnorm.diagnostics.subject import Subject


class StatisticsValues(Check):
    code = "BN202"
    name = "statistics-values"
    severity = "error"
    symptom = "Evaluation gives nan or huge numbers, while training goes on."
    why = (
        "A batch with inf or nan makes torch's running statistics nan for good; E[x²] - E[x]² in float32, or an "
        "average of a wrong file, makes variances negative, whose root is nan."
    )
    source = "pytorch #88474, #90342, #96798, #115500"
    yields_to = ("BN406",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, layer in subject.tracking.items():
            mean, variance = statistics(layer)
            lost = int((~(mean.isfinite() & variance.isfinite())).sum())
            negative = int((variance < 0).sum())
            again = "bn.population(model, batches)"
            if lost:
                yield self.finding(
                    path,
                    f"{plural(lost, 'channel')} of it with statistics that are not finite",
                    again,
                    channels=lost,
                )
            if negative:
                yield self.finding(
                    path,
                    f"{plural(negative, 'channel')} of it with a negative variance",
                    again,
                    channels=negative,
                )

            zero = int((variance == 0).sum())
            if zero:
                yield self.finding(
                    path,
                    f"{plural(zero, 'channel')} of it with a variance of 0: evaluation multiplies by 1 / sqrt(eps)",
                    again,
                    severity="info" if subject.gets_activations(path) else "warning",
                    channels=zero,
                )

    def fix(self, subject: Subject, finding: Finding) -> str:
        return subject.measure_again(finding.layer)

    def plant(self, case: Case) -> None:
        case.layer.running_var[0] = float("nan")
