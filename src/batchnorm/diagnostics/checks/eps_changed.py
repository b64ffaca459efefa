"""BN605: eps or momentum that is not that of the training."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class EpsChanged(Check):
    code = "BN605"
    name = "eps-changed"
    severity = "error"
    symptom = "The exported or rebuilt model differs from the trained one, with the same weights."
    why = "eps is in no state_dict: a model that is made again, by other code or another framework, has its own."
    source = "EfficientNet-PyTorch #3; ludwig #2100; onnxscript #1791"
    needs = ("reference",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        assert subject.reference is not None
        trained = dict(subject.reference.named_modules())
        for path, layer in subject.layers.items():
            other = trained.get(path)
            if other is None or not hasattr(other, "eps") or not hasattr(layer, "eps"):
                continue
            if float(layer.eps) != float(other.eps):
                yield self.finding(
                    path,
                    f"eps is {layer.eps:g}, and was {other.eps:g} in training",
                    f'bn.configure(model, eps={other.eps:g}, only="{path}")',
                    eps=float(layer.eps),
                    trained=float(other.eps),
                )

    def fix(self, subject: Subject, finding: Finding) -> str:
        subject.layers[finding.layer].eps = finding.evidence["trained"]
        return f"eps {finding.evidence['eps']:g} → {finding.evidence['trained']:g}"

    def plant(self, case: Case) -> None:
        case.options["reference"] = deepcopy(case.model)
        case.layer.eps = 2e-5
