"""Figure 1: batch normalization makes the MNIST network train in a fraction of the steps.

Claim     a network with BN reaches the same test accuracy in far fewer steps, and the inputs to its
          sigmoids keep a stable distribution while those of the network without BN move
Source    Ioffe & Szegedy 2015, section 4.1, figure 1 (a), (b), (c); the paper prints curves, no numbers
Expected  at least 10 times fewer steps to some accuracy of 80 % or more, at the same learning rate
Cost      about 2.5 minutes on two cores
Measured  docs/experiments.md
"""

from __future__ import annotations

import statistics

from batchnorm.experiments.claim import Claim, Curve, Curves, Finding, Settings, label, net, percent, spread
from batchnorm.records import Chart, Line, Panel, Table
from batchnorm.training.config import Training

ACCURACIES = (80, 85, 90, 92, 94)
# Seed 0 is trained for all the paper's steps, for the pictures; the other seeds long enough for the verdict.
REPLICATE_STEPS = 10_000
# "Each at its own best rate": these are tried, and the best is the one that is first at this accuracy.
RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SWEEP_STEPS = 2_000
BEST_STEPS = 5_000
BEST_ACCURACY = 0.90


class Figure1(Claim):
    """The three pictures of figure 1, at the same rate for both networks and at the best rate of each."""

    name = "figure-1"
    title = "With batch normalization the network trains in a fraction of the steps"
    source = "section 4.1, figure 1"
    expected = (
        "at least 10 times fewer steps to some test accuracy of 80 % or more, at the same learning rate"
    )

    def choices(self, settings: Settings) -> list[str]:
        """See `Claim.choices`."""
        return [
            f"Learning rate of the shared-rate comparison: {settings.rate:g}, plain SGD (the paper gives none); "
            f"tried for the best rate of each: {', '.join(f'{rate:g}' for rate in RATES)}.",
            f"Initial weights: Gaussian of standard deviation {settings.init_std:g} (the paper: 'small random "
            "Gaussian values'; 1/√100 = 0.1 keeps signals in scale), the same for both networks. Biases and β start "
            "at 0, γ at 1.",
            f"Seed 0 is trained for {settings.steps:,} steps, other seeds for {REPLICATE_STEPS:,} at most.",
            "Accuracy with BN uses the population statistics of Algorithm 2 over 20 training batches.",
            "Steps to an accuracy: the first evaluation that reaches it; evaluations are at most 10 % apart.",
        ]

    def jobs(self, settings: Settings, curves: Curves) -> dict[str, Training]:
        """Both networks at the shared rate for every seed, a sweep over rates, then both at their best."""
        jobs = {}
        for seed in range(settings.seeds):
            steps = settings.steps if seed == 0 else min(settings.steps, REPLICATE_STEPS)
            for bn in (True, False):
                jobs[_same(bn, seed)] = _training(settings, bn, settings.rate, seed, steps, watch=True)
        for bn in (True, False):
            for rate in RATES:
                jobs[_sweep(bn, rate)] = _training(settings, bn, rate, 0, min(settings.steps, SWEEP_STEPS))
        if all(_sweep(bn, rate) in curves for bn in (True, False) for rate in RATES):
            for seed in range(settings.seeds):
                for bn in (True, False):
                    best, steps = best_rate(curves, bn), min(settings.steps, BEST_STEPS)
                    jobs[_best(bn, seed)] = _training(settings, bn, best, seed, steps)
        return jobs

    def charts(self, settings: Settings, curves: Curves) -> list[Chart]:
        """Figure 1(a), figure 1(b, c), and 1(a) again with each network at its best rate."""
        charts = [
            _accuracy_chart(
                "figure-1a",
                f"Test accuracy against training steps, both networks at learning rate {settings.rate:g}",
                f"The paper's figure 1(a). Line: seed 0; band: all {settings.seeds} seeds as far as they go.",
                {bn: [curves.get(_same(bn, seed)) for seed in range(settings.seeds)] for bn in (True, False)},
            ),
            _percentile_chart({bn: curves.get(_same(bn, 0)) for bn in (True, False)}),
        ]
        best = {bn: [curves.get(_best(bn, seed)) for seed in range(settings.seeds)] for bn in (True, False)}
        if any(curve for row in best.values() for curve in row):
            rates = ", ".join(f"{label(bn)} {best_rate(curves, bn):g}" for bn in (True, False))
            charts.append(
                _accuracy_chart(
                    "figure-1a-best-rates",
                    f"The same, each network at its own best learning rate ({rates})",
                    f"The best rate of each is the one that first reaches {percent(BEST_ACCURACY, 0)} in a sweep.",
                    best,
                )
            )
        return charts

    def find(self, settings: Settings, curves: Curves) -> Finding:
        """Steps to each accuracy and their ratio, at the same rate and at the best rates; how far inputs move."""
        seeds = range(settings.seeds)
        same = {bn: [curves[_same(bn, seed)] for seed in seeds] for bn in (True, False)}
        best = {bn: [curves[_best(bn, seed)] for seed in seeds] for bn in (True, False)}
        same_table, ratios = _steps_table(same)
        best_table, best_ratios = _steps_table(best)
        travel = {bn: [_travel(curve) for curve in same[bn]] for bn in (True, False)}
        tables = {
            f"Steps to a test accuracy, both networks at rate {settings.rate:g}": same_table,
            "Steps to a test accuracy, each network at its own best rate "
            f"({', '.join(f'{label(bn)} {best_rate(curves, bn):g}' for bn in (True, False))})": best_table,
            "How far the input to a sigmoid of the last hidden layer moves": Table(
                columns=["", label(False), label(True)],
                rows=[["path of the median", *(spread(travel[bn], "{:.1f}") for bn in (False, True))]],
                note="Length of the path of the median over the evaluations that all seeds share, in units of the "
                "mean 15-85 percentile width, averaged over the 100 sigmoids; mean ± standard deviation over seeds.",
            ),
            "Accuracy after the last step, at the shared rate": _final_table(same),
        }
        if not ratios:
            return Finding(False, "No accuracy of 80 % or more was reached by both networks.", tables)
        level, ratio = max(ratios.items(), key=lambda item: item[1])
        measured = (
            f"{ratio:.1f} times fewer steps to {level} % at the same rate"
            f" ({spread([c.steps_to(int(level) / 100) for c in same[False]])} without BN,"
            f" {spread([c.steps_to(int(level) / 100) for c in same[True]])} with BN, {settings.seeds} seeds)."
        )
        if best_ratios:
            listed = ", ".join(f"{ratio:.1f} to {level} %" for level, ratio in best_ratios.items())
            measured += f" Each at its own best rate the ratio is {listed}."
        ends = {bn: statistics.fmean(curve.best_accuracy for curve in best[bn]) for bn in (True, False)}
        measured += (
            f" The input to a sigmoid moves {spread(travel[False], '{:.1f}')} widths without BN,"
            f" {spread(travel[True], '{:.1f}')} with. The higher accuracy in the end, which the paper's figure shows,"
            f" is {'' if ends[True] > ends[False] else 'not '}seen here: {percent(ends[False])} without BN,"
            f" {percent(ends[True])} with, each at its best rate."
        )
        return Finding(ratio >= 10, measured, tables, {level: round(r, 2) for level, r in ratios.items()})


def best_rate(curves: Curves, bn: bool) -> float:
    """The rate of the sweep that reaches `BEST_ACCURACY` first; if none does, that of the highest accuracy."""

    def merit(rate: float) -> tuple[float, float]:
        curve = curves[_sweep(bn, rate)]
        return (-(curve.steps_to(BEST_ACCURACY) or float("inf")), curve.best_accuracy)

    return max(RATES, key=merit)


def _training(
    settings: Settings, bn: bool, rate: float, seed: int, steps: int, watch: bool = False
) -> Training:
    return Training(batch_norm=bn, rate=rate, steps=steps, seed=seed, init_std=settings.init_std, watch=watch)


def _same(bn: bool, seed: int) -> str:
    return f"same-rate-{net(bn)}-seed{seed}"


def _sweep(bn: bool, rate: float) -> str:
    return f"sweep-{net(bn)}-rate{rate:g}"


def _best(bn: bool, seed: int) -> str:
    return f"best-rate-{net(bn)}-seed{seed}"


def _steps_table(curves: dict[bool, list[Curve]]) -> tuple[Table, dict[str, float]]:
    """Steps to each accuracy, and the mean over seeds of their ratio where every network got there."""
    rows, ratios = [], {}
    for accuracy in ACCURACIES:
        steps = {bn: [curve.steps_to(accuracy / 100) for curve in row] for bn, row in curves.items()}
        ratio = [p / b if p and b else None for p, b in zip(steps[False], steps[True], strict=True)]
        there = [r for r in ratio if r is not None]
        if len(there) == len(ratio):
            ratios[str(accuracy)] = statistics.fmean(there)
        both = spread(ratio, "{:.1f}") if len(there) == len(ratio) else "–"
        rows.append([f"{accuracy} %", spread(steps[False]), spread(steps[True]), both])
    note = (
        "Mean ± standard deviation over seeds; the ratio is taken seed by seed: the same initial weights, the "
        "same batches."
    )
    return Table(columns=["accuracy", label(False), label(True), "ratio"], rows=rows, note=note), ratios


def _final_table(curves: dict[bool, list[Curve]]) -> Table:
    rows = []
    for bn in (False, True):
        for curve in curves[bn]:
            result = curve.result
            assert result is not None
            moving = "–" if result.accuracy_moving is None else percent(result.accuracy_moving, 2)
            rows.append(
                [
                    label(bn),
                    str(curve.config.seed),
                    f"{result.steps:,}",
                    percent(curve.best_accuracy, 2),
                    percent(result.accuracy, 2),
                    moving,
                    percent(result.train_accuracy, 2),
                ]
            )
    return Table(
        columns=["network", "seed", "steps", "best", "last", "by moving averages", "training set"],
        rows=rows,
        note="'last' uses Algorithm 2's population statistics in the network with BN, 'by moving averages' "
        "torch's running statistics with momentum 0.1.",
    )


def _travel(curve: Curve) -> float | None:
    """The path so far at the last evaluation that a replicate shares with seed 0."""
    return next((e.travel for e in reversed(curve.evaluations) if e.step <= REPLICATE_STEPS), None)


def _accuracy_chart(name: str, title: str, caption: str, curves: dict[bool, list[Curve | None]]) -> Chart:
    lines = []
    for bn in (True, False):
        there = [curve for curve in curves[bn] if curve is not None]
        if not there:
            continue
        steps = [evaluation.step for evaluation in there[0].evaluations]
        at = [{e.step: e.accuracy for e in curve.evaluations} for curve in there]
        everyone = [[a[step] for a in at] if all(step in a for a in at) else None for step in steps]
        lines.append(
            Line(
                label=label(bn),
                role="bn" if bn else "plain",
                x=[float(step) for step in steps],
                y=[at[0][step] for step in steps],
                low=[min(values) if values else None for values in everyone],
                high=[max(values) if values else None for values in everyone],
            )
        )
    panel = Panel(
        title="",
        x_label="training steps",
        y_label="test accuracy",
        x_log=True,
        y_range=(0.0, 1.0),
        y_percent=True,
        lines=lines,
    )
    return Chart(claim="figure-1", name=name, title=title, caption=caption, panels=[panel])


def _percentile_chart(curves: dict[bool, Curve | None]) -> Chart:
    panels = []
    for bn, letter in ((False, "b"), (True, "c")):
        curve = curves[bn]
        watched = [e for e in curve.evaluations if e.percentiles] if curve else []
        low, median, high = (
            zip(*(e.percentiles or () for e in watched), strict=True) if watched else ((),) * 3
        )
        panels.append(
            Panel(
                title=f"({letter}) {label(bn)}",
                x_label="training steps",
                y_label="input to a sigmoid",
                x_log=True,
                lines=[
                    Line(
                        label="median, and 15th to 85th percentile",
                        role="bn" if bn else "plain",
                        x=[float(e.step) for e in watched],
                        y=list(median),
                        low=list(low),
                        high=list(high),
                    )
                ],
            )
        )
    return Chart(
        claim="figure-1",
        name="figure-1bc",
        title="The input to one sigmoid of the last hidden layer while the network trains",
        caption="The paper's figure 1(b, c): {15, 50, 85}th percentiles over the test set, first unit of the last "
        "hidden layer, seed 0.",
        panels=panels,
    )
