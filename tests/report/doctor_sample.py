"""An examination of a ResNet-50, made up from formulas: what the tests of the doctor's reports read.

`python -m tests.report.doctor_sample FILE` writes its page there, to look at.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from batchnorm.report.doctor_page import render
from batchnorm.report.examined import Examined, Explained, FixedRow, Layer, Row, Shift

PATHS = ["bn1"] + [
    f"layer{stage}.{block}.{name}"
    for stage, blocks in enumerate((3, 4, 6, 3), 1)
    for block in range(blocks)
    for name in ("bn1", "bn2", "bn3", *(("downsample.1",) if block == 0 else ()))
]

CHECKS = {
    "BN101": Explained(
        "evaluation-depends-on-the-batch", "error", "A prediction changes with the other examples of its batch.",
        "A layer without running statistics normalises by the batch in evaluation too.", "pytorch #9153",
    ),
    "BN201": Explained(
        "momentum", "warning", "The network is good in training and bad in evaluation.",
        "torch's momentum is the share of the new batch. 0.9 or 0.99, the share of the old average in Keras, makes "
        "the running statistics those of the last batch.", "pytorch/examples #289; tacotron #19",
    ),
    "BN206": Explained(
        "weight-decay", "info", "Weights of normalization shrink for nothing.",
        "Weight decay on weight and bias pulls them to 0, where nothing else does.", "Goyal et al. 2017, section 5.1",
    ),
    "BN405": Explained(
        "stale-statistics", "warning", "eval() far worse than train() on the same data.",
        "What comes to the layer has another mean or variance than its running statistics say.",
        "Ioffe & Szegedy 2015, algorithm 2, line 10",
    ),
}  # fmt: skip


def row(code: str, layer: str, message: str, fix: str = "", severity: Any = None, **evidence: Any) -> Row:
    return {
        "code": code, "severity": severity or CHECKS[code].severity, "layer": layer, "message": message,
        "evidence": evidence, "fix": fix,
    }  # fmt: skip


def gap(number: int) -> float:
    """Small at first, and larger behind the layer with another framework's momentum."""
    return 0.03 + 0.02 * math.sin(number) ** 2 + (0.6 * math.exp(-(number - 29) / 8) if number >= 29 else 0.0)


LAYERS = [
    Layer(path, f"BatchNorm2d({64 << min(number // 12, 4)})", gap(number), 0.04, 1568, 0.03 + 0.001 * number)
    for number, path in enumerate(PATHS)
]


def examined() -> Examined:
    findings = [
        *(
            row("BN206", path, "weight decay pulls its weight and bias to 0", "bn.param_groups(model, 1e-4)",
                decay=1e-4)
            for path in PATHS
        ),
        *(
            row("BN405", layer.path, f"in evaluation its outputs are {layer.gap:.2f} standard deviations from those "
                "in training (0.04 by chance): the weights before it have changed since",
                "bn.population(model, batches)", gap=layer.gap or 0.0, by_chance=0.04, channels=17)
            for layer in LAYERS if layer.gap and layer.gap > 0.25
        ),
        row("BN201", "layer3.1.bn2", "momentum is 0.99, the share of the newest batch: 0.01 of Keras's convention?",
            'bn.configure(model, momentum=0.01, only="layer3.1.bn2")', momentum=0.99),
        row("BN101", "layer4.2.bn3", "it has no running statistics: each prediction depends on its batch",
            "bn.configure(model, track_running_stats=True), and train on", largest=0.71),
        row("BN302", "", "some layers are in evaluation mode and others in training", "model.train()", "error",
            layers=3),
    ]  # fmt: skip
    fixed: list[FixedRow] = [
        {
            **row("BN201", path, "momentum is 0: its running statistics never move", momentum=0),
            "change": "momentum 0 → 0.1",
        }
        for path in ("layer1.0.bn1", "layer1.0.bn2")
    ]  # fmt: skip
    return Examined(
        title="torchvision:resnet50",
        findings=findings,
        fixed=fixed,
        skipped={
            "BN203": "it needs the optimizer: examine(model, optimizer=optimizer)",
            "BN204": "it needs the optimizer: examine(model, optimizer=optimizer)",
            "BN301": "it needs training steps: with bn.watch(model, optimizer)",
        },
        layers=LAYERS,
        checks=CHECKS,
        command="batchnorm examine torchvision:resnet50 --weights r50.pth --data imagenet --fix --report r50.html",
        versions={"batchnorm": "0.1.0", "torch": "2.14.1+cpu", "python": "3.11.9"},
        date="2026-03-01T09:30:00Z",
    )


def shift(layer: str, number: int) -> Shift:
    steps = [float(step) for step in range(0, 1001, 50)]
    middle = [math.sin(step / 300 + number) * (1 + number % 5) / 3 for step in steps]
    drift = [0.0, *(abs(b - a) for a, b in pairwise(middle))]
    return Shift(layer, steps, [m - 1 for m in middle], middle, [m + 1.1 for m in middle], drift)


def watched() -> Examined:
    """The same, of a training that was watched too."""
    return replace(examined(), shift=[shift(path, number) for number, path in enumerate(PATHS)])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(watched()), encoding="utf-8")
