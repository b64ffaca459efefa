"""A run as an experiment would write it, made up from formulas: what the tests of the report read.

`python -m tests.report.sample FOLDER` writes it there and builds its page, to look at.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from batchnorm import records
from batchnorm.records import Chart, Evaluation, Line, Panel, Result, Run, Table, Verdict

STEPS = [
    100,
    200,
    300,
    500,
    700,
    1000,
    1500,
    2000,
    3000,
    5000,
    7000,
    10000,
    15000,
    20000,
    30000,
    40000,
    50000,
]

RUN = Run(
    experiment="mnist",
    title="Batch normalization on MNIST",
    command="batchnorm reproduce mnist --claims all --seeds 0,1,2 --out runs/mnist",
    config={
        "data": {"name": "mnist-10k", "train": 8000, "test": 2000, "binary": True},
        "model": {"hidden": [100, 100, 100], "activation": "sigmoid", "init_std": 0.1},
        "training": {"batch": 60, "steps": 50000, "learning_rate": 0.1},
    },
    seeds=[0, 1, 2],
    versions={"batchnorm": "0.1.0", "torch": "2.14.1+cpu", "python": "3.11.9"},
    machine="2 cores, x86_64, AVX2",
    started="2026-03-01T09:30:00Z",
)


def accuracy(step: float, half: float, top: float) -> float:
    """A learning curve: 10 % at first, half of the way at `half` steps, `top` in the end."""
    way = 1 / (1 + (half / step) ** 1.6)
    return 0.1 + (top - 0.1) * float(way)


def figure_1a() -> Chart:
    lines = []
    for label, role, half, top in (("with BN", "bn", 45, 0.962), ("without BN", "plain", 900, 0.943)):
        y = [accuracy(step, half, top) for step in STEPS]
        low = [accuracy(step, half * 1.35, top - 0.004) for step in STEPS]
        high = [accuracy(step, half * 0.75, top + 0.003) for step in STEPS]
        lines.append(
            Line.model_validate({"label": label, "role": role, "x": STEPS, "y": y, "low": low, "high": high})
        )
    return Chart(
        claim="figure-1",
        name="figure-1a",
        title="Test accuracy against training steps",
        caption="Figure 1(a) of the paper. Both nets at learning rate 0.1; the line is the mean of three seeds, the"
        " band their range.",
        panels=[
            Panel(
                title="", x_label="training steps", y_label="test accuracy",
                x_log=True, y_range=(0.0, 1.0), y_percent=True, lines=lines,
            )
        ],
    )  # fmt: skip


def figure_1bc() -> Chart:
    panels = []
    for title, role, wander in (
        ("Without batch normalization", "plain", 1.0),
        ("With batch normalization", "bn", 0.12),
    ):
        lines = []
        for label, offset in (("85th", 1.05), ("median", 0.0), ("15th", -1.1)):
            y = [
                wander * 1.6 * math.sin(math.log(step) * 0.9)
                + offset * (1 + wander * 0.8 * math.log10(step / 100))
                for step in STEPS
            ]
            lines.append(
                Line.model_validate(
                    {"label": label, "role": role, "x": STEPS, "y": y, "dashed": label != "median"}
                )
            )
        panels.append(
            Panel(
                title=title, x_label="training steps", y_label="input to one sigmoid",
                x_log=True, y_range=(-5.0, 5.0), lines=lines,
            )
        )  # fmt: skip
    return Chart(
        claim="figure-1",
        name="figure-1bc",
        title="The input to a sigmoid of the last hidden layer",
        caption="Figure 1(b, c) of the paper: the 15th, 50th and 85th percentile over the test set, seed 0.",
        panels=panels,
    )


def sweep() -> Chart:
    rates = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
    bn: list[float | None] = [0.71, 0.88, 0.93, 0.951, 0.962, 0.964, 0.957, 0.93, 0.81]
    plain: list[float | None] = [0.11, 0.12, 0.31, 0.74, 0.91, 0.943, 0.62, None, None]
    dropout: list[float | None] = [0.11, 0.12, 0.25, 0.66, 0.88, 0.93, None, 0.11, None]
    return Chart(
        claim="learning-rates",
        name="learning-rates",
        title="Accuracy after 10,000 steps, by learning rate",
        caption="A gap is a network that diverged.",
        panels=[
            Panel(
                title="", x_label="learning rate", y_label="test accuracy", x_log=True, y_range=(0.0, 1.0),
                y_percent=True,
                lines=[
                    Line(label="with batch normalization", role="bn", x=rates, y=bn, markers=True),
                    Line(label="without", role="plain", x=rates, y=plain, markers=True),
                    Line(label="without, dropout 0.5", role="other", x=rates, y=dropout, markers=True, dashed=True),
                ],
            )
        ],
    )  # fmt: skip


def scales() -> Chart:
    panels = []
    for depth in (3, 5, 9):
        lines = []
        for role, title in (("bn", "with BN"), ("plain", "without BN")):
            for std in (0.01, 1.0):
                half = (60 if role == "bn" else 900 * depth / 3) * (2 if std == 0.01 else 1)
                y = [accuracy(step, half, 0.95) for step in STEPS]
                lines.append(
                    Line.model_validate({"label": f"{title}, std {std:g}", "role": role, "x": STEPS, "y": y})
                )
        panels.append(
            Panel(
                title=f"{depth} layers", x_label="training steps", y_label="test accuracy",
                x_log=True, y_range=(0.0, 1.0), y_percent=True, lines=lines,
            )
        )  # fmt: skip
    return Chart(
        claim="initial-scale", name="initial-scale", title="Accuracy by the scale of the initial weights",
        caption="Learning rate 0.1, one seed.", panels=panels,
    )  # fmt: skip


VERDICTS = [
    Verdict(
        claim="figure-1",
        title="Batch normalization makes the network train faster and reach a higher accuracy",
        source="Section 4.1, figure 1",
        expected="at least 10 times fewer steps to some test accuracy of 80 % or more, at the same learning rate",
        measured="With batch normalization 80 % took 126 steps on average, without it 1,990: a ratio of 15.8. The"
        " input to the last sigmoids moved 0.9 widths with it and 6.4 without.",
        outcome="seen",
        choices=[
            "The learning rate, 0.1, is ours: the paper names none for this experiment.",
            "Initial weights are Gaussian with standard deviation 0.1; the paper says “small random Gaussian values”.",
            "Binary pixels are grey values above 127.",
        ],
        tables={
            "Steps to an accuracy, learning rate 0.1": Table(
                columns=["test accuracy", "with BN", "without BN", "ratio", "spread over seeds"],
                rows=[
                    ["80 %", "126", "1,990", "15.8", "14.1–17.0"],
                    ["85 %", "180", "2,460", "13.7", "12.0–14.9"],
                    ["90 %", "330", "3,900", "11.8", "10.9–12.5"],
                    ["95 %", "2,100", "not reached", "—", "—"],
                ],
                note="Evaluated every 10 steps up to 3,000 and every 500 after.",
            ),
            "Each net at its own best rate": Table(
                columns=["net", "rate", "accuracy", "steps to 90 %"],
                rows=[["with BN", "0.3", "96.4 %", "210"], ["without BN", "0.3", "94.3 %", "1,400"]],
            ),
        },
        steps_ratio={"80": 15.79, "85": 13.67, "90": 11.8},
    ),
    Verdict(
        claim="learning-rates",
        title="It allows much higher learning rates without divergence",
        source="Section 3.3",
        expected="the highest rate that trains to 90 % is at least 10 times higher",
        measured="Rates up to 3 train to 90 % with batch normalization, up to 0.3 without.",
        outcome="seen",
        tables={},
        steps_ratio=None,
    ),
    Verdict(
        claim="regulariser",
        title="It regularises the model, and dropout can be removed",
        source="Section 3.4",
        expected="the gap between training and test accuracy is smaller with batch normalization than with neither",
        measured="The gap is 3.9 points with batch normalization, 3.1 with dropout and 3.6 with neither.",
        outcome="not seen here",
        choices=["Dropout 0.5 after each hidden layer."],
        steps_ratio=None,
    ),
    Verdict(
        claim="initial-scale",
        title="It makes training insensitive to the scale of the initial weights",
        source="Section 3.3",
        expected="90 % for every standard deviation from 0.001 to 10",
        measured="4 of 10 networks are trained so far.",
        outcome="incomplete",
        steps_ratio=None,
    ),
]


def evaluations() -> list[Evaluation]:
    return [
        Evaluation(
            job=f"{net}-lr0.1-seed{seed}",
            step=step,
            loss=2.3 * (1 - accuracy(step, half, 0.99)) + 0.02,
            accuracy=accuracy(step, half * (1 + 0.1 * seed), top),
            accuracy_moving=accuracy(step, half * (1.1 + 0.1 * seed), top) if net == "bn" else None,
            percentiles=(-1.1, 0.0, 1.05),
            travel=(0.3 if net == "bn" else 2.1) * math.log10(step / 10),
        )
        for net, half, top in (("bn", 45, 0.962), ("plain", 900, 0.943))
        for seed in (0, 1, 2)
        for step in STEPS
    ]


def results() -> list[Result]:
    finished = [
        Result(
            job=f"{net}-lr0.1-seed{seed}",
            config={"batch_norm": net == "bn", "learning_rate": 0.1, "init_std": 0.1, "seed": seed},
            steps=50000, diverged=False, loss=loss + 0.001 * seed, accuracy=top - 0.001 * seed,
            accuracy_moving=top - 0.0015 if net == "bn" else None, train_accuracy=0.9995,
            seconds=61.5 + 4 * seed + (20 if net == "bn" else 0),
        )
        for net, loss, top in (("bn", 0.0021, 0.962), ("plain", 0.0137, 0.943))
        for seed in (0, 1, 2)
    ]  # fmt: skip
    diverged = Result(
        job="plain-lr10-seed0", config={"batch_norm": False, "learning_rate": 10, "init_std": 0.1, "seed": 0},
        steps=310, diverged=True, loss=math.inf, accuracy=0.0985, train_accuracy=0.1012, seconds=0.6,
    )  # fmt: skip
    return [*finished, diverged]


def complete() -> list[records.Record]:
    charts = [figure_1a(), figure_1bc(), sweep(), scales()]
    return [RUN, *evaluations(), *results(), *charts, *VERDICTS]


def interrupted() -> list[records.Record]:
    """The same run, stopped while the networks without BN were being trained."""
    cut = [record for record in evaluations() if record.job.startswith("bn") or record.step <= 1500]
    return [RUN, *cut, *results()[:3]]


def write(run: Path, lines: list[records.Record]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    text = "".join(line.model_dump_json() + "\n" for line in lines)
    (run / "records.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    from batchnorm.report import build

    folder = Path(sys.argv[1])
    for name, lines in (("complete", complete()), ("interrupted", interrupted())):
        write(folder / name, lines)
        print(build(folder / name))
