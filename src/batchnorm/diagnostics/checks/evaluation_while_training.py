"""BN305: evaluation mode that was left on."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class EvaluationWhileTraining(Check):
    code = "BN305"
    name = "evaluation-while-training"
    severity = "warning"
    symptom = (
        "Training is as slow as without batch normalization, or diverges at its rate; statistics stand still."
    )
    why = (
        "model.eval() for a validation, and no model.train() after it; or a model that was loaded in evaluation mode. "
        "The gradient then does not flow through mean and variance, and running statistics stay."
    )
    source = "Ioffe & Szegedy 2015, section 2 (gradients that ignore the normalization); pytorch #4741"
    needs = ("steps",)
    yields_to = ("BN204",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        assert subject.steps is not None
        layers = {path: each for path, each in subject.steps.layers.items() if path in subject.learning}
        wrong = [path for path, each in layers.items() if each.evaluation > each.training]
        if wrong and all(each.evaluation > each.training for each in layers.values()):
            yield self.finding(
                wrong[0] if len(layers) == 1 and not wrong[0] else "",
                "all layers are in evaluation mode while the model is trained",
                "model.train() before the steps; to train so on purpose, bn.freeze(model)",
                layers=len(wrong),
            )
            return
        for path in wrong:
            yield self.finding(
                path,
                f"is in evaluation mode in {layers[path].evaluation} of its calls, with gradients",
                "model.train(), or bn.freeze of this part if it is meant",
                calls=layers[path].evaluation,
            )

    def plant(self, case: Case) -> None:
        case.model.eval()
        case.path = ""
