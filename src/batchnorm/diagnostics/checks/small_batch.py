"""BN402: batches too small for their variance."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.checks.single_value import SingleValue
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.estimate import population


class SmallBatch(Check):
    code = "BN402"
    name = "small-batch"
    severity = "warning"
    symptom = "Training is noisy and evaluation differs from it, the more the smaller the batch."
    why = (
        "The statistics of a few values are far from those of the data: their noise comes into every output, and "
        "evaluation has none of it."
    )
    source = (
        "Ioffe 2017 (batch renormalization); Wu & He 2018 (group normalization), figure 1; pytorch #46516"
    )
    needs = ("measured",)
    yields_to = ("BN401", "BN502")

    def find(self, subject: Subject) -> Iterator[Finding]:
        measured = subject.measured
        for path, found in measured.layers.items():
            few = found.count < 16
            if found.samples < 2 or (not few and found.noise < 0.5):
                continue
            yield self.finding(
                path,
                f"{found.count} values per channel in a batch: its statistics move its outputs by "
                f"{found.noise:.0%} of a standard deviation",
                "larger batches, bn.convert_sync(model), bn.virtual_batch(model), statistics=bn.Renorm(), or "
                "bn.freeze of a pre-trained model",
                severity="warning" if found.noise >= 0.5 or found.count < 8 else "info",
                values=found.count,
                noise=found.noise,
            )

    def plant(self, case: Case) -> None:
        """In the batches; at a layer behind a pooling to 1 × 1, the others get many positions."""
        SingleValue().plant(case)
        case.batches = [nn.functional.interpolate(batch[:3], size=(160, 160)) for batch in case.batches[:3]]
        population(case.model, case.batches)
