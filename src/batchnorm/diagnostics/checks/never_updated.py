"""BN206: running statistics that are still 0 and 1."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check, plural
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import batches_tracked, is_initial
from batchnorm.diagnostics.subject import Subject


class NeverUpdated(Check):
    code = "BN206"
    name = "never-updated"
    severity = "warning"
    symptom = "Good in training, at chance in evaluation."
    why = (
        "The layer has never been called in training mode, or its forward does not update: a momentum of 0, a branch "
        "that training does not reach, a pass that was paused. Evaluation then normalises by mean 0 and variance 1."
    )
    source = "Cadene/pretrained-models.pytorch #5; pytorch #4741, #5406"
    yields_to = ("BN201", "BN207")

    def find(self, subject: Subject) -> Iterator[Finding]:
        layers = subject.learning
        initial = [path for path, layer in layers.items() if is_initial(layer)]
        again = "train first, or bn.population(model, batches)"
        fresh = len(initial) == len(layers) and all(not batches_tracked(each) for each in layers.values())
        if initial and fresh and all(each.training for each in layers.values()):
            yield self.finding(
                initial[0] if len(initial) == 1 else "",
                f"the running statistics of {plural(len(initial), 'layer')} are 0 and 1: no batch was seen yet",
                again,
                severity="info",
                layers=len(initial),
            )
            return
        for path in [each for each in initial if each in subject.evaluated] if initial else ():
            seen = batches_tracked(layers[path])
            counted = "" if seen is None else f", after {plural(seen, 'batch')}"
            yield self.finding(
                path,
                f"its running statistics are still 0 and 1{counted}",
                again,
                batches=-1 if seen is None else seen,
            )

    def fix(self, subject: Subject, finding: Finding) -> str:
        return subject.measure_again(finding.layer)

    def plant(self, case: Case) -> None:
        case.layer.running_mean.zero_()
        case.layer.running_var.fill_(1)
