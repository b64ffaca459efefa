"""Figures 2 and 3: with batch normalization Inception trains in a fraction of the steps, and ends higher.

Claim     BN-x5 needs 14 times fewer steps than Inception to Inception's best accuracy; BN-x30 ends 2.6 points above it
Source    Ioffe & Szegedy 2015, section 4.2.2, figures 2 and 3
Expected  BN-x5 at Inception's best accuracy in at least 10 times fewer steps, and some BN network at least one point
          above it in the end
Cost      quick: seven minutes on two cores; scaled: two hours; the paper's: a cluster
Measured  docs/experiments.md
"""

from __future__ import annotations

import statistics

from batchnorm.data.data_sets import NAMES as DATA_SETS
from batchnorm.experiments.claim import Claim, Curve, Curves, Finding, percent, seeds_note, spread
from batchnorm.experiments.imagenet import variants
from batchnorm.experiments.imagenet.inception_settings import PAPER as PAPER_SCALE
from batchnorm.experiments.imagenet.inception_settings import ImagenetSettings
from batchnorm.experiments.imagenet.variants import NAMES, job
from batchnorm.records import Chart, Line, Panel, Role, Table
from batchnorm.training.config import Config

# Figure 3 as printed: steps to 72.2 % in millions, and the highest accuracy in per cent.
PAPER_STEPS = 31.0
# Batches of 32, by 1,281,167 images: 31.0e6 steps, and the 6e6 after which BN-x30 was at its best.
PAPER_PASSES, PAPER_PASSES_OF_X30 = 774, 150
PAPER: dict[str, tuple[float | None, float]] = {
    "inception": (PAPER_STEPS, 72.2),
    "bn-baseline": (13.3, 72.7),
    "bn-x5": (2.1, 73.0),
    "bn-x30": (2.7, 74.8),
    "bn-x5-sigmoid": (None, 69.8),
}
ROLES: dict[str, Role] = {
    "inception": "plain",
    "bn-baseline": "bn",
    "bn-x5": "bn",
    "bn-x30": "bn",
    "bn-x5-sigmoid": "other",
}
# Three networks share a colour: one is dashed, one has markers.
_DASHED, _MARKED = "bn-baseline", "bn-x30"
FEWER_STEPS = 10
POINTS_ABOVE = 0.01
POINTS_BELOW = (10, 5, 2, 1)


class Figure3(Claim[ImagenetSettings, Config]):
    """The five networks of figure 3: steps to Inception's best accuracy, and the best accuracy of each.

    images: number of training images.
    """

    name = "figure-3"
    title = "With batch normalization Inception trains in a fraction of the steps, and ends higher"
    source = "section 4.2.2, figures 2 and 3"
    expected = (
        f"BN-x5 reaches Inception's best accuracy in at least {FEWER_STEPS} times fewer steps, and some network with "
        "BN ends at least one point above it"
    )

    def __init__(self, images: int) -> None:
        self._images = images

    def choices(self, settings: ImagenetSettings) -> list[str]:
        """See `Claim.choices`."""
        rates = ", ".join(f"{rate:g}" for rate in settings.rates)
        tried = min(settings.sweep_steps, settings.steps)
        chosen = (
            f"Inception's rate is the best of {rates}, by the best accuracy in {tried:,} steps from another seed; "
            "the others' rates are 1, 5 and 30 times that."
            if len(settings.rates) > 1
            else f"Inception's rate is {rates}; the others' rates are 1, 5 and 30 times that."
        )
        slow, fast = (
            variants.variant(settings, name, settings.rates[0], 0).optimizer
            for name in ("inception", "bn-x5")
        )
        decays = (settings.steps - 1) // slow.decay_every
        short = variants.steps(settings, "bn-x5")

        def passes(steps: int) -> float:
            return steps * settings.batch_size / self._images

        return [
            f"The network is that of figure 5 with {settings.width:g} times the channels, for images of "
            f"{settings.image_size} pixels, batches of {settings.batch_size}; He et al.'s initial weights. "
            f"{variants.describe_crops(settings)}",
            chosen,
            "SGD with momentum 0.9; L2 of 2e-4 on weights, 4e-5 in the networks with the changes of section 4.2.1; "
            "dropout of 0.4 before the classifier, and none. The paper gives none of the first three numbers.",
            f"Inception and BN-Baseline are trained for {settings.steps:,} steps, in which the rate decays {decays} "
            f"times by 4 %, to {percent(slow.decay**decays, 0)}; in the paper's 31 million {variants.DECAYS} times, "
            f"to 2 %. The others, whose rate decays 6 times faster (every {_steps(fast.decay_every)}, not "
            f"{slow.decay_every:,}), are trained for {short:,}.",
            f"With that Inception sees every image {passes(settings.steps):.1f} times, and BN-x5 {passes(short):.1f} "
            f"times; in the paper {PAPER_PASSES} times and, at its best, {PAPER_PASSES_OF_X30} (BN-x30).",
            "Neither network has local response normalization.",
            "The target is the best accuracy of Inception from the same seed; steps are those of the first evaluation "
            "that reaches it. Evaluations are at most 25 % of the steps so far apart. Accuracy with BN is by "
            "Algorithm 2's population statistics over 20 training batches.",
        ]

    def jobs(self, settings: ImagenetSettings, curves: Curves) -> dict[str, Config]:
        """The sweep, then every variant for every seed."""
        rate = variants.best_rate(settings, curves)
        jobs = variants.sweep(settings)
        if rate is not None:
            for seed in range(settings.seeds):
                for name in NAMES:
                    jobs[job(name, seed)] = variants.variant(settings, name, rate, seed)
        return jobs

    def charts(self, settings: ImagenetSettings, curves: Curves) -> list[Chart]:
        """Figure 2: accuracy against steps."""
        lines = [
            line for name in NAMES if (line := _line(name, _curves_of(settings, curves, name))) is not None
        ]
        if not lines:
            return []
        panel = Panel(
            title="",
            x_label="training steps",
            y_label="validation accuracy",
            x_log=True,
            y_range=_upper_part(lines),
            y_percent=True,
            lines=lines,
        )
        return [
            Chart(
                claim=self.name,
                name="figure-2",
                title=f"Validation accuracy on {settings.data} against training steps",
                caption="The paper's figure 2, its axis of steps drawn in logarithms. "
                + ("Line: median over the seeds; band: all of them. " if settings.seeds > 1 else "")
                + _scale(settings),
                panels=[panel],
            )
        ]

    def find(self, settings: ImagenetSettings, curves: Curves) -> Finding:
        """Steps to Inception's best accuracy and the best accuracies, beside the paper's own."""
        by_name = {name: _curves_of(settings, curves, name) for name in NAMES}
        targets = [curve.best_accuracy for curve in by_name["inception"]]
        steps = {name: [c.steps_to(t) for c, t in zip(by_name[name], targets, strict=True)] for name in NAMES}
        fewer = {name: _ratios(steps["inception"], steps[name]) for name in NAMES}
        best = {name: statistics.fmean(c.best_accuracy for c in by_name[name]) for name in NAMES}
        higher = max((name for name in NAMES if name != "inception"), key=lambda name: best[name])
        above = round(
            best[higher] - best["inception"], 9
        )  # so that exactly one point is not below it by rounding
        rows = []
        for name, printed in PAPER.items():
            millions, accuracy = printed
            rows.append(
                [
                    NAMES[name],
                    spread(steps[name]),
                    spread(fewer[name], "{:.1f}"),
                    spread((c.best_accuracy for c in by_name[name]), "{:.2%}"),
                    f"{millions}e6" if millions else "–",
                    f"{PAPER_STEPS / millions:.1f}" if millions else "–",
                    f"{accuracy} %",
                ]
            )
        tables = {
            "Steps to Inception's best accuracy, and the best accuracy of each": Table(
                columns=[
                    "network",
                    "steps",
                    "times fewer",
                    "best",
                    "paper: steps",
                    "paper: times fewer",
                    "paper: best",
                ],
                rows=rows,
                note=f"{seeds_note(settings.seeds)}; the paper's columns are ImageNet's, to 72.2 %. {_scale(settings)}",
            ),
            "Times fewer steps to lesser accuracies": _lower_accuracies_table(by_name, targets),
            "Every network": _network_table(by_name, targets),
        }
        if len(settings.rates) > 1:
            tables["Inception's rate"] = _sweep_table(settings, curves)
        ratio = _mean(fewer["bn-x5"])
        speedup = (
            f"BN-x5 needs {ratio:.3g} times fewer steps"
            if ratio
            else "BN-x5 does not reach it from every seed"
        )
        means = {name: _mean(fewer[name]) for name in NAMES}
        fastest = max(means, key=lambda name: means[name])
        fastest_note = (
            ""
            if fastest in ("inception", "bn-x5")
            else f"; {NAMES[fastest]} needs {spread(fewer[fastest], '{:.1f}')} times fewer"
        )
        return Finding(
            ratio >= FEWER_STEPS and above >= POINTS_ABOVE,
            f"To Inception's best accuracy, {spread(targets, '{:.2%}')} after {spread(steps['inception'])} steps, "
            f"{speedup} ({spread(steps['bn-x5'])}){fastest_note}. {NAMES[higher]} ends highest, {100 * above:+.3g} "
            f"points from Inception: {percent(best[higher], 2)}. In the last quarter of its steps Inception gained "
            f"{_late_gain_text(by_name['inception'])} points{_at_edge(settings, curves)}. "
            f"{_scale(settings)}",
            tables,
        )


def _late_gain_text(curves: list[Curve[Config]]) -> str:
    """The gain in best accuracy, in points, over the last quarter of the steps, as a check of convergence."""
    gains = []
    for curve in curves:
        before = [e.accuracy for e in curve.evaluations if e.step <= 0.75 * curve.evaluations[-1].step]
        gains.append(100 * (curve.best_accuracy - max(before, default=0.0)))
    return spread(gains, "{:.2f}")


def _at_edge(settings: ImagenetSettings, curves: Curves) -> str:
    """Whether a rate that was not tried might have been better still."""
    rate = variants.best_rate(settings, curves)
    edge = len(settings.rates) > 1 and rate in (min(settings.rates), max(settings.rates))
    return f"; its rate, {rate:g}, is at the edge of those that were tried" if edge else ""


def _scale(settings: ImagenetSettings) -> str:
    """The scale of the run, to accompany every result."""
    if all(getattr(settings, name) == value for name, value in PAPER_SCALE.items() if name != "seeds"):
        return f"At the paper's scale, on {settings.data}."
    kind = "A quick look, scaled down" if settings.scale == "quick" else "A scaled run"
    if settings.data in DATA_SETS:
        return f"{kind}, on {settings.data} and not on ImageNet."
    return f"{kind}, on {settings.data} with other settings than the paper's."


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number:,} steps"


def _curves_of(settings: ImagenetSettings, curves: Curves, name: str) -> list[Curve[Config]]:
    found = (curves.get(job(name, seed)) for seed in range(settings.seeds))
    return [curve for curve in found if curve is not None]


def _ratios(plain: list[int | None], others: list[int | None]) -> list[float | None]:
    return [a / b if a and b else None for a, b in zip(plain, others, strict=True)]


def _mean(ratios: list[float | None]) -> float:
    """The mean ratio; 0 if some seed did not reach the accuracy."""
    reached = [ratio for ratio in ratios if ratio is not None]
    return statistics.fmean(reached) if len(reached) == len(ratios) else 0.0


def _line(name: str, curves: list[Curve[Config]]) -> Line | None:
    """The line of a network: the median over seeds at every step at which all were evaluated."""
    at = [{e.step: e.accuracy for e in curve.evaluations} for curve in curves]
    steps = sorted(set.intersection(*map(set, at))) if at else []
    if not steps:
        return None
    values = [[each[step] for each in at] for step in steps]
    return Line(
        label=NAMES[name],
        role=ROLES[name],
        dashed=name == _DASHED,
        markers=name == _MARKED,
        x=[float(step) for step in steps],
        y=[statistics.median(each) for each in values],
        low=[min(each) for each in values],
        high=[max(each) for each in values],
    )


def _upper_part(lines: list[Line]) -> tuple[float, float]:
    """The y range: the upper 30 points, or more if the best accuracy of some network is lower."""
    best = [max(y for y in line.y if y is not None) for line in lines]
    lowest = min(max(best) - 0.3, min(best) - 0.05)
    return (max(0.0, round(lowest, 2)), min(1.0, round(max(best) + 0.02, 2)))


def _lower_accuracies_table(by_name: dict[str, list[Curve[Config]]], targets: list[float]) -> Table:
    """The ratio of steps to lower accuracies, which Inception reaches earlier."""
    rows = []
    for points in POINTS_BELOW:
        lesser = [target - points / 100 for target in targets]
        steps = {
            n: [c.steps_to(t) for c, t in zip(curves, lesser, strict=True)] for n, curves in by_name.items()
        }
        fewer = (spread(_ratios(steps["inception"], steps[n]), "{:.1f}") for n in NAMES if n != "inception")
        rows.append([spread(lesser, "{:.2%}"), spread(steps["inception"]), *fewer])
    others = [label for name, label in NAMES.items() if name != "inception"]
    below = ", ".join(map(str, POINTS_BELOW[:-1]))
    return Table(
        columns=["accuracy", "Inception's steps", *others],
        rows=rows,
        note=f"The accuracies are Inception's best less {below} and {POINTS_BELOW[-1]} points.",
    )


def _network_table(by_name: dict[str, list[Curve[Config]]], targets: list[float]) -> Table:
    rows = []
    for name, curves in by_name.items():
        for seed, (curve, target) in enumerate(zip(curves, targets, strict=True)):
            result, reached = curve.result, curve.steps_to(target)
            assert result is not None
            moving = "–" if result.accuracy_moving is None else percent(result.accuracy_moving, 2)
            rows.append(
                [
                    NAMES[name],
                    str(seed),
                    f"{curve.config.optimizer.rate:g}",
                    f"{result.steps:,}",
                    f"{reached:,}" if reached else "not reached",
                    f"{curve.steps_to(curve.best_accuracy):,}",
                    percent(curve.best_accuracy, 2),
                    "diverged" if result.diverged else percent(result.accuracy, 2),
                    moving,
                ]
            )
    return Table(
        columns=[
            "network",
            "seed",
            "rate",
            "steps",
            "target at",
            "best at",
            "best",
            "last",
            "by moving averages",
        ],
        rows=rows,
        note="'last' is by Algorithm 2's population statistics, 'by moving averages' by torch's with momentum 0.1.",
    )


def _sweep_table(settings: ImagenetSettings, curves: Curves) -> Table:
    rows = [
        [f"{rate:g}", percent(curve.best_accuracy, 2), percent(curve.evaluations[-1].accuracy, 2)]
        for rate, curve in variants.sweep_curves(settings, curves).items()
    ]
    return Table(
        columns=["rate", "best", "last"], rows=rows, note="One seed, which the runs above do not use."
    )
