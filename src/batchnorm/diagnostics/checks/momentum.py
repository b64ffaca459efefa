"""BN201: a momentum that is another framework's, or none."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class Momentum(Check):
    code = "BN201"
    name = "momentum"
    severity = "warning"
    symptom = (
        "The network is good in training and bad in evaluation, or its evaluation jumps from step to step."
    )
    why = (
        "torch's momentum is the share of the new batch. 0.9 or 0.99, the share of the old average in Keras, Caffe or "
        "MXNet, makes the running statistics those of the last batch; 0 leaves them as they were."
    )
    source = (
        "pytorch/examples #289; EfficientNet-PyTorch #3; Cadene/pretrained-models.pytorch #5; tacotron #19"
    )

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, layer in subject.learning.items():
            momentum = getattr(layer, "momentum", None)
            if momentum is None:
                continue
            if momentum == 0:
                yield self.finding(
                    path,
                    "momentum is 0: its running statistics never move",
                    f'bn.configure(model, momentum=0.1, only="{path}")',
                    momentum=0,
                )
            elif momentum >= 0.9:
                other = round(1 - momentum, 12)
                yield self.finding(
                    path,
                    f"momentum is {momentum:g}, the share of the newest batch: {other:g} of Keras's convention?",
                    f'bn.configure(model, momentum={other:g}, only="{path}")',
                    momentum=momentum,
                )
            elif momentum < 0:
                yield self.finding(
                    path,
                    f"momentum is {momentum:g}: no average of anything",
                    f'bn.configure(model, momentum=0.1, only="{path}")',
                    severity="error",
                    momentum=momentum,
                )

    def fix(self, subject: Subject, finding: Finding) -> str:
        momentum = float(finding.evidence["momentum"])
        new = round(1 - momentum, 12) if 0.9 <= momentum < 1 else 0.1
        subject.layers[finding.layer].momentum = new
        return f"momentum {momentum:g} → {new:g}"

    def plant(self, case: Case) -> None:
        case.layer.momentum = 0.99
