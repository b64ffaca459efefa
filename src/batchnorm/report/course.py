"""The page of a training: the best accuracy, its course with the losses and the rate, and the classes.

What is said of classes is of the evaluation with the best accuracy, whose network checkpoints/best.pt holds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from batchnorm.records import Chart, Evaluation, Line, Panel, Role
from batchnorm.report.contents import Contents, Headline, Network
from batchnorm.report.tables import Grid, format_share

_MATRIX = 20  # classes; a larger matrix is unreadable
_UNEVEN = 3  # a last gap between evaluations so many times their median asks for a logarithmic axis
_LISTED = 1_000  # classes in the table


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix: of the images of each class, in a row, how many were taken for each."""

    names: list[str]
    rows: list[list[int]]

    def share(self, row: int, column: int) -> float:
        """Of the images of a class, the share taken for another."""
        return self.rows[row][column] / max(1, sum(self.rows[row]))


def headline(contents: Contents) -> Headline:
    """The best accuracy of the network, and the last one where it is another."""
    network = contents.networks[0] if contents.networks else None
    best = _best(network)
    if network is None or best is None:
        return Headline("", "Not evaluated yet")
    last = network.last
    moving = network.result.accuracy_moving if network.result is not None else None
    averages = "" if moving is None else f"{100 * moving:.2f} % by the moving averages"
    if last is None or last is best:
        detail = averages and f"{averages}."
    else:
        detail = (
            f"The best of {len(network.evaluations)} evaluations, which checkpoints/best.pt holds; "
            f"{100 * last.accuracy:.2f} % after {_steps(last.step)}"
            + (f" ({averages})." if averages else ".")
        )
    return Headline(
        f"{100 * best.accuracy:.2f} %", f"of the validation images right after {_steps(best.step)}", detail
    )


def course(contents: Contents) -> Chart | None:
    """Accuracy, losses and learning rate against steps; None before the first evaluation."""
    if not contents.networks or not contents.networks[0].evaluations:
        return None
    network = contents.networks[0]
    evaluations = [network.evaluations[step] for step in sorted(network.evaluations)]
    gaps = [second.step - first.step for first, second in itertools.pairwise(evaluations)]
    log = len(gaps) > 1 and gaps[-1] > _UNEVEN * statistics.median(gaps)

    def panel(label: str, percent: bool, *lines: Line | None) -> Panel:
        drawn = [line for line in lines if line is not None]
        if len(drawn) == 1:
            drawn = [drawn[0].model_copy(update={"label": ""})]
        return Panel(
            title="", x_label="training steps", y_label=label, x_log=log, y_percent=percent, lines=drawn
        )

    def line(label: str, role: Role, value: Callable[[Evaluation], float | None]) -> Line | None:
        values = [value(each) for each in evaluations]
        if all(each is None for each in values):
            return None
        steps = [float(each.step) for each in evaluations]
        return Line(label=label, role=role, x=steps, y=values, markers=len(values) <= 30)

    panels = [
        panel(
            "validation accuracy",
            True,
            line("of the network", "bn", lambda each: each.accuracy),
            line("of averaged weights", "plain", lambda each: each.accuracy_average),
            line("among five", "other", lambda each: each.accuracy_top5),
        ),
        panel(
            "loss, nats",
            False,
            line("training", "other", lambda each: each.loss if math.isfinite(each.loss) else None),
            line("validation", "bn", lambda each: each.loss_validation),
        ),
        panel("learning rate", False, line("", "other", lambda each: each.rate)),
    ]
    return Chart(
        claim="",
        name="course",
        title="The course of the training",
        caption="At each evaluation. The training loss is what is minimised, label smoothing and auxiliary heads "
        "included, the mean since the evaluation before; the validation loss is the cross-entropy.",
        panels=[each for each in panels if each.lines],
    )


def classes(contents: Contents) -> Grid | None:
    """The accuracy on each class, the lowest first, and for what its images were taken; None if it is not recorded."""
    best = _best(contents.networks[0] if contents.networks else None)
    if best is None or not best.confusion:
        return None
    images: dict[int, int] = {}
    wrong: dict[int, dict[int, int]] = {}
    for true, taken, count in best.confusion:
        images[true] = images.get(true, 0) + count
        if taken != true:
            wrong.setdefault(true, {})[taken] = count

    def accuracy(true: int) -> float:
        return 1 - sum(wrong.get(true, {}).values()) / max(1, images[true])

    named = any(taken >= 0 for each in wrong.values() for taken in each)
    rows = []
    for true in sorted(images, key=lambda each: (accuracy(each), each))[:_LISTED]:
        mistaken = sorted(wrong.get(true, {}).items(), key=lambda each: -each[1])
        rows.append(
            [
                _name(contents, true),
                f"{images[true]:,}",
                format_share(accuracy(true)),
                *(
                    [", ".join(f"{_name(contents, taken)} ({count:,})" for taken, count in mistaken[:3])]
                    if named
                    else []
                ),
            ]
        )
    columns = ["class", "images", "right", *(["taken for"] if named else [])]
    which = "the lowest first" if len(images) <= _LISTED else f"the lowest {_LISTED:,} of {len(images):,}"
    return Grid("Classes", columns, rows, f"By the evaluation after {_steps(best.step)}; {which}.")


def confusion(contents: Contents) -> Matrix | None:
    """The confusion matrix, in the order of the classes; None for many classes, or if it is not recorded."""
    best = _best(contents.networks[0] if contents.networks else None)
    if best is None or not best.confusion:
        return None
    number = max(len(contents.run.classes), *(1 + max(true, taken) for true, taken, _ in best.confusion))
    if number > _MATRIX or min(taken for _, taken, _ in best.confusion) < 0:
        return None
    rows = [[0] * number for _ in range(number)]
    for true, taken, count in best.confusion:
        rows[true][taken] = count
    return Matrix([_name(contents, each) for each in range(number)], rows)


def _best(network: Network | None) -> Evaluation | None:
    """The evaluation with the best accuracy, of equal ones the first: the one whose network is kept.

    That of a network whose loss had become inf or nan is not, unless there is no other.
    """
    if network is None or not network.evaluations:
        return None
    every = [network.evaluations[step] for step in sorted(network.evaluations)]
    return max([each for each in every if math.isfinite(each.loss)] or every, key=lambda each: each.accuracy)


def _name(contents: Contents, number: int) -> str:
    names = contents.run.classes
    return names[number] if 0 <= number < len(names) else str(number)


def _steps(number: int) -> str:
    return f"{number:,} step{'s' * (number != 1)}"
