"""BN204: a layer in evaluation mode while the others train."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics.check import Check
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

    def find(self, subject: Subject) -> Iterator[Finding]:
        layers = {path: layer for path, layer in subject.tracking.items() if not subject.is_frozen(layer)}
        training = [path for path, layer in layers.items() if layer.training]
        if not training or len(training) == len(layers):
            return
        few = (
            training if 2 * len(training) < len(layers) else [path for path in layers if path not in training]
        )
        mode, others = ("training", "evaluation") if few is training else ("evaluation", "training")
        for path in few:
            yield self.finding(
                path,
                f"is in {mode} mode, most others in {others}",
                "bn.freeze(model, only=...) lasts, .eval() does not; or model.train()",
                mode=mode,
                alike=len(few),
                layers=len(layers),
            )

    def plant(self, model: nn.Module, path: str) -> None:
        layer = model.get_submodule(path)
        layer.train(not layer.training)
