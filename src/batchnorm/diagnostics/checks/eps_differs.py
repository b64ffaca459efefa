"""BN211: layers whose eps is not that of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject

_TORCH_S = 1e-5


class EpsDiffers(Check):
    code = "BN211"
    name = "eps-differs"
    severity = "warning"
    symptom = "Weights that were right elsewhere give slightly, or badly, other outputs."
    why = (
        "eps is part of what a layer computes and of no checkpoint: 1e-5 in torch, 1e-3 in Keras and TensorFlow. A "
        "layer that was made with another than the rest was made by other code than the rest."
    )
    source = "EfficientNet-PyTorch #3; ludwig #2100; pix2pix #126"

    def find(self, subject: Subject) -> Iterator[Finding]:
        values = {path: float(layer.eps) for path, layer in subject.layers.items() if hasattr(layer, "eps")}
        if len(values) < 2:
            return
        usual, number = Counter(values.values()).most_common(1)[0]
        if number <= len(values) / 2:  # torch's, of two that differ
            usual, number = (_TORCH_S, 1) if _TORCH_S in values.values() else (0.0, 0)
        for path, eps in values.items():
            part = {other for other in values if _part(other) == _part(path)}
            a_part = all(values[other] == eps for other in part)  # a head that is made so, on a backbone
            if eps <= 0 or (number and not 0.2 <= eps / usual <= 5):
                yield self.finding(
                    path,
                    f"eps is {eps:g}, of {number} of {len(values)} layers {usual:g}",
                    f'bn.configure(model, eps={usual:g}, only="{path}"), if it was trained with that',
                    severity="info" if eps > 0 and a_part else "warning",
                    eps=eps,
                    usual=usual,
                )

    def plant(self, case: Case) -> None:
        case.layer.eps = 1e-3


def _part(path: str) -> str:
    """The child of the model in which a layer is; the model itself where children have numbers."""
    name = path.partition(".")[0]
    return "" if name.isdecimal() or "." not in path else name
