"""BN409: padding in the statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
                share=shares[path],
                layers=len(padded),
            )

    def plant(self, case: Case) -> None:
        """In what comes to the layer: the ends of rows, of different lengths."""

        def pad(module: Any, given: Any) -> Any:
            x = given[0].clone()
            for number in range(len(x)):
                x[number, ..., max(x.shape[-1] // 2 - number % 2, 0) :] = 0
            return (x,)

        case.layer.register_forward_pre_hook(pad)
        population(case.model, case.batches)
