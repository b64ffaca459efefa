"""BN201: a momentum that is another framework's, or none."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Check
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
        for path, layer in subject.tracking.items():
            momentum = layer.momentum
            if momentum is None or subject.is_frozen(layer):
                continue
            if momentum == 0:
                yield self.finding(
                    path,
                    "momentum is 0: its running statistics never move",
                    "bn.configure(model, momentum=0.1)",
                    momentum=0,
                )
            elif momentum >= 0.9:
                other = round(1 - momentum, 12)
                yield self.finding(
                    path,
                    f"momentum is {momentum:g}, the share of the newest batch: {other:g} of Keras's convention?",
                    f"bn.configure(model, momentum={other:g})",
                    momentum=momentum,
                )

    def fix(self, model: nn.Module, finding: Finding) -> None:
        momentum = float(finding.evidence["momentum"])
        layer = model.get_submodule(finding.layer)
        layer.momentum = round(1 - momentum, 12) if 0 < momentum < 1 else 0.1  # type: ignore[assignment]

    def plant(self, model: nn.Module, path: str) -> None:
        model.get_submodule(path).momentum = 0.99  # type: ignore[assignment]
