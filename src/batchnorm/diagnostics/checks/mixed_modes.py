"""BN204: a layer in evaluation mode while the others train."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class MixedModes(Check):
    code = "BN204"
    name = "mixed-modes"
    severity = "warning"
    symptom = "Part of the network trains with running statistics, or a frozen part drifts."
    why = (
        ".eval() on a part ends with the next model.train(), and a part that is added later is in training mode. So "
        "layers end up in other modes than their model."
    )
    source = "pytorch #86590, #10856; PyTorch Lightning PR 15063"
    yields_to = ("BN601",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        layers = subject.learning
        training = [path for path, layer in layers.items() if layer.training]
        if not training or len(training) == len(layers):
            return
        others = [path for path in layers if path not in training]
        few, most = (training, others) if 2 * len(training) < len(layers) else (others, training)
        mode, usual = ("training", "evaluation") if few is training else ("evaluation", "training")
        for path in few:
            yield self.finding(
                path,
                f"is in {mode} mode, {len(most)} of {len(layers)} in {usual}",
                "model.train() or model.eval(); to freeze a part for good, bn.freeze(part)",
                mode=mode,
                alike=len(few),
                layers=len(layers),
            )

    def fix(self, subject: Subject, finding: Finding) -> str:
        layer = subject.layers[finding.layer]
        layer.training = not layer.training
        return f"{finding.evidence['mode']} mode → that of the others"

    def plant(self, case: Case) -> None:
        case.layer.train(not case.layer.training)
