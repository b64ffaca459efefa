"""BN409: padding in the statistics."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Case, Check, plural
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.estimate import population


class Padding(Check):
    code = "BN409"
    name = "padding"
    severity = "warning"
    symptom = (
        "Outputs depend on how long the longest sequence of the batch is; evaluation one by one is worse."
    )
    why = (
        "Sequences or images of different sizes are filled up, and the filling is counted: it moves the mean towards "
        "itself and makes the variance smaller, by the share that it has in the batch."
    )
    source = "pytorch #70529, #25910, #30414, #81985; tensorflow #30161; deepspeech #312, #360"
    needs = ("measured",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        shares = {
            path: sum(each.padded * each.count for each in found.arrivals)
            / sum(each.count for each in found.arrivals)
            for path, found in subject.measured.layers.items()
        }
        padded = [path for path, share in shares.items() if share > 0.05]
        if padded:
            path = padded[0]  # what is behind it has it from here
            others = f", and of {plural(len(padded) - 1, 'layer')} behind it" if len(padded) > 1 else ""
            yield self.finding(
                path,
                f"{shares[path]:.0%} of its positions look like padding, and are counted{others}",
                "with bn.mask(model, mask): or layer(x, mask=lengths)",
                severity="warning" if subject.measured.given_padded else "info",  # windows of a network's own
                share=shares[path],
                layers=len(padded),
            )

    def plant(self, case: Case) -> None:
        """In the images: their right sides are empty, from other columns on; the first layer gets it."""
        case.path = next(
            path for path, each in case.model.named_modules() if isinstance(each, nn.BatchNorm2d)
        )
        for batch in case.batches:
            for number, image in enumerate(batch):
                image[..., image.shape[-1] // 2 - number % 3 :] = 0
        population(case.model, case.batches)
