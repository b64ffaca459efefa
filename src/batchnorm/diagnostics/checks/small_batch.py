"""BN402: batches too small for their variance."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.checks.single_value import SingleValue
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.estimate import population

_LARGER = (
    "larger batches, bn.convert_sync(model), bn.virtual_batch(model, ...), statistics=bn.Renorm(), or bn.freeze of a "
    "pre-trained model"
)


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
    follows = ("BN308",)
    yields_to = ("BN401", "BN502")

    def find(self, subject: Subject) -> Iterator[Finding]:
        measured = subject.measured
        flagged = False
        for path, found in measured.layers.items():
            examples = min(each.samples for each in found.arrivals)
            few = found.count < 16 or (examples <= 2 and found.count < 64)
            if found.samples < 2 or (not few and found.noise < 0.5):
                continue
            flagged = True
            yield self.finding(
                path,
                f"{found.count} values per channel in a batch of {examples}: its statistics move its outputs by "
                f"{found.noise:.0%} of a standard deviation",
                _LARGER,
                severity="warning" if found.noise >= 0.5 or found.count < 8 or examples <= 2 else "info",
                values=found.count,
                noise=found.noise,
            )
        examples = min(measured.sizes, default=8)
        if measured.layers and not flagged and examples < 8:
            noisiest = max(measured.layers, key=lambda path: measured.layers[path].noise)
            noise = measured.layers[noisiest].noise
            yield self.finding(
                "",
                f"batches of {examples}: their statistics move outputs by up to {noise:.0%} of a standard deviation "
                f"(at {noisiest})",
                _LARGER,
                severity="info",
                examples=examples,
                noise=noise,
            )

    def plant(self, case: Case) -> None:
        """In the batches; at a layer behind a pooling to 1 × 1, the others get many positions."""
        SingleValue().plant(case)
        case.batches = [nn.functional.interpolate(batch[:3], size=(160, 160)) for batch in case.batches[:3]]
        population(case.model, case.batches)
