"""Regularisation: batch normalization narrows the gap between training and test accuracy, as Dropout does.

Claim     a training example is seen with the others of its mini-batch, which regularises: Dropout can go
Source    Ioffe & Szegedy 2015, section 3.4
Expected  a smaller gap with BN than with neither, and a test accuracy no lower than with Dropout
Cost      about 2 minutes on two cores
Measured  docs/experiments.md
"""

from __future__ import annotations

import statistics

from batchnorm.experiments.claim import Claim, Curves, Finding, percent, role, spread
from batchnorm.experiments.mnist.digits_settings import DigitsSettings
from batchnorm.records import Chart, Line, Panel, Table
from batchnorm.training.digits_trainer import Training

STEPS = 10_000
RATE = 1.0
DROPOUT = 0.5
# name in jobs: label, batch norm, dropout, dashed
KINDS: dict[str, tuple[str, bool, float, bool]] = {
    "neither": ("neither", False, 0.0, False),
    "dropout": (f"Dropout {DROPOUT:g}", False, DROPOUT, True),
    "bn": ("BN", True, 0.0, False),
}


class Regularization(Claim[DigitsSettings, Training]):
    """The same network with neither, with Dropout, with BN."""

    name = "regularization"
    title = "Batch normalization regularises, so that Dropout can be removed"
    source = "section 3.4"
    expected = (
        "a smaller gap between training and test accuracy with BN than with neither, and a test accuracy no "
        "lower than with Dropout"
    )

    def choices(self, settings: DigitsSettings) -> list[str]:
        """See `Claim.choices`."""
        return [
            f"Sigmoid network of figure 1, learning rate {RATE:g}, {min(settings.steps, STEPS):,} steps.",
            f"Dropout of {DROPOUT:g} after every hidden layer.",
        ]

    def jobs(self, settings: DigitsSettings, curves: Curves) -> dict[str, Training]:
        """The three networks for every seed."""
        return {
            _job(kind, seed): Training(
                batch_norm=bn,
                dropout=dropout,
                rate=RATE,
                steps=min(settings.steps, STEPS),
                seed=seed,
                init_std=settings.init_std,
            )
            for seed in range(settings.seeds)
            for kind, (_, bn, dropout, _) in KINDS.items()
        }

    def charts(self, settings: DigitsSettings, curves: Curves) -> list[Chart]:
        """Test accuracy and training loss against steps, seed 0."""
        present = {kind: curves[_job(kind, 0)] for kind in KINDS if _job(kind, 0) in curves}

        def panel(label: str, key: str, percent: bool) -> Panel:
            return Panel(
                title=label,
                x_label="training steps",
                y_label=label,
                x_log=True,
                y_percent=percent,
                y_range=(0.0, 1.0) if percent else None,
                lines=[
                    Line(
                        label=KINDS[kind][0],
                        role=role(KINDS[kind][1]),
                        dashed=KINDS[kind][3],
                        x=[float(e.step) for e in curve.evaluations],
                        y=[getattr(e, key) for e in curve.evaluations],
                    )
                    for kind, curve in present.items()
                ],
            )

        return [
            Chart(
                claim=self.name,
                name="regularization",
                title="Neither, Dropout, batch normalization",
                caption="Seed 0. The training loss with Dropout is measured with Dropout on.",
                panels=[panel("test accuracy", "accuracy", True), panel("training loss", "loss", False)],
            )
        ]

    def find(self, settings: DigitsSettings, curves: Curves) -> Finding:
        """The gap between training and test accuracy at the end."""
        test, gap, rows = {}, {}, []
        for kind, (name, *_) in KINDS.items():
            results = [curves[_job(kind, seed)].result for seed in range(settings.seeds)]
            pairs = [
                (result.train_accuracy, result.accuracy)
                for result in results
                if result is not None and result.train_accuracy is not None
            ]
            train, test[kind] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            gap[kind] = [on_training - on_test for on_training, on_test in pairs]
            rows.append([name, *(spread(values, "{:.2%}") for values in (train, test[kind], gap[kind]))])
        mean = {kind: statistics.fmean(values) for kind, values in gap.items()}
        tests = {kind: statistics.fmean(values) for kind, values in test.items()}

        def in_words(values: dict[str, float]) -> str:
            return ", ".join(f"{percent(value, 2)} with {KINDS[kind][0]}" for kind, value in values.items())

        return Finding(
            mean["bn"] < mean["neither"] and tests["bn"] >= tests["dropout"],
            f"Gap {in_words(mean)}; test accuracy {in_words(tests)}.",
            {"Accuracy at the end": Table(columns=["", "training", "test", "gap"], rows=rows)},
        )


def _job(kind: str, seed: int) -> str:
    return f"regularization-{kind}-seed{seed}"
