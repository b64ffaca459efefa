"""The records of a run by subject: each chart, verdict and network once, in its latest version."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from batchnorm.records import (
    Chart,
    Evaluation,
    Line,
    Panel,
    Record,
    RecordError,
    Result,
    Run,
    Verdict,
)
from batchnorm.report.curve import thinned

_MOST = {"charts": 60, "verdicts": 100, "networks": 2_000}


@dataclass
class Network:
    """The records of one network: its evaluations, and its result if it has ended."""

    job: str
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    result: Result | None = None

    @property
    def normalized(self) -> bool:
        """Whether it has batch normalization; if not configured, whether there is an accuracy by moving averages."""
        if self.result is not None and isinstance(self.result.config.get("batch_norm"), bool):
            return bool(self.result.config["batch_norm"])
        if self.result is not None and self.result.accuracy_moving is not None:
            return True
        return any(evaluation.accuracy_moving is not None for evaluation in self.evaluations.values())

    @property
    def last(self) -> Evaluation | None:
        """The evaluation after the most steps."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None


@dataclass
class Contents:
    """The records of one run, by subject.

    run: as it was last resumed, if that changed it.
    commands: those that began it and changed it.
    """

    run: Run
    verdicts: list[Verdict]
    charts: list[Chart]
    networks: list[Network]
    commands: list[str] = field(default_factory=list)

    @property
    def judged(self) -> bool:
        """Whether the run tests claims; a run of `batchnorm train` does not."""
        return self.run.experiment != "train"

    @property
    def finished(self) -> bool:
        """Whether all verdicts are complete; for a run without claims, whether the network has ended."""
        if not self.judged:
            return any(network.result is not None for network in self.networks)
        return bool(self.verdicts) and all(verdict.outcome != "incomplete" for verdict in self.verdicts)

    @property
    def resume(self) -> str:
        """The command that resumes the run."""
        command = self.run.command.rstrip()
        return command if "--resume" in command.split() else f"{command} --resume"


def gather(records: Iterable[Record]) -> Contents:
    """Group `records` by subject; the last version of a chart or verdict replaces earlier ones, in their position.

    Raises: RecordError when the run record is missing, or there is more than a page shows.
    """
    runs: list[Run] = []
    verdicts: dict[str, Verdict] = {}
    charts: dict[str, Chart] = {}
    networks: dict[str, Network] = {}
    for record in records:
        if isinstance(record, Run):
            runs.append(record)
            for network in networks.values():
                network.result = None  # of the end before the run was made longer
        elif isinstance(record, Verdict):
            verdicts[record.claim] = record
        elif isinstance(record, Chart):
            charts[record.name] = _thinned(record)
        elif isinstance(record, Evaluation):
            networks.setdefault(record.job, Network(record.job)).evaluations[record.step] = record
        elif isinstance(record, Result):
            networks.setdefault(record.job, Network(record.job)).result = record
    if not runs:
        raise RecordError("the records name no run: the line of kind 'run' is missing")
    for what, found in (("charts", charts), ("verdicts", verdicts), ("networks", networks)):
        if len(found) > _MOST[what]:
            raise RecordError(f"there are {len(found):,} {what}, and a page shows {_MOST[what]:,}")
    # the verdict with the headline comes first
    ordered = sorted(verdicts.values(), key=lambda verdict: not ratios(verdict))
    commands = list(dict.fromkeys(run.command for run in runs))
    run = runs[-1].model_copy(update={"started": runs[0].started})
    return Contents(run, ordered, list(charts.values()), list(networks.values()), commands)


def _thinned(chart: Chart) -> Chart:
    """Once, as each chart is drawn several times."""
    panels = [panel.model_copy(update={"lines": list(map(thinned, panel.lines))}) for panel in chart.panels]
    return chart.model_copy(update={"panels": panels})


def ratios(verdict: Verdict) -> dict[float, float]:
    """The finite ratios of a verdict, by accuracy in per cent, ascending."""
    found = {
        float(accuracy): ratio
        for accuracy, ratio in (verdict.steps_ratio or {}).items()
        if re.fullmatch(r"\d+(\.\d+)?", accuracy) and math.isfinite(ratio) and ratio > 0
    }
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Headline:
    """The headline of the page; `others` are further ratios, (accuracy, ratio)."""

    number: str
    sentence: str
    detail: str = ""
    others: tuple[tuple[str, str], ...] = ()


def headline(contents: Contents) -> Headline:
    """The ratio of steps if there is one, else the number of claims seen, else the state of the run.

    That of a training is another: see course.py.
    """
    best = ratios(contents.verdicts[0]) if contents.verdicts else {}
    if best:
        # the claim is about some accuracy of 80 % or more: take the largest of these ratios
        accuracy = max((a for a in best if a >= 80), key=lambda a: best[a], default=max(best))
        ratio = best[accuracy]
        sentence = f"steps to {accuracy:g} % test accuracy with batch normalization"
        seeds = len(contents.run.seeds)
        detail = "At the same learning rate as without it" + (
            f"; mean over {seeds} seeds." if seeds > 1 else "."
        )
        others = tuple((f"{a:g} %", f"{_ratio(best[a])}×") for a in best) if len(best) > 1 else ()
        if ratio >= 1:
            return Headline(f"{_ratio(ratio)}×", f"fewer {sentence}", detail, others)
        return Headline(f"{_ratio(1 / ratio)}×", f"more {sentence}", detail, others)
    judged = [verdict for verdict in contents.verdicts if verdict.outcome != "incomplete"]
    if len(judged) == 1:
        return Headline("", judged[0].outcome.capitalize(), judged[0].title)
    if judged:
        seen = sum(verdict.outcome == "seen" for verdict in judged)
        return Headline(f"{seen} of {len(judged)}", "claims of the paper seen here")
    ended = sum(network.result is not None for network in contents.networks)
    return Headline(
        "", "No verdict yet", f"{_networks(ended)} ended, {len(contents.networks) - ended} under way."
    )


def progress(contents: Contents) -> Chart | None:
    """Accuracy against steps for every network, for a run without a verdict."""
    lines: list[Line] = []
    groups = {
        "with batch normalization": [n for n in contents.networks if n.evaluations and n.normalized],
        "without batch normalization": [n for n in contents.networks if n.evaluations and not n.normalized],
    }
    few = sum(map(len, groups.values())) <= 4
    for (name, networks), role in zip(groups.items(), ("bn", "plain"), strict=True):
        for number, network in enumerate(networks):
            steps = sorted(network.evaluations)
            # many networks share one label and colour per group
            group = f"{name} ({len(networks)})" if number == 0 else ""
            lines.append(
                Line(
                    label=network.job if few else group,
                    role="bn" if role == "bn" else "plain",
                    x=[float(step) for step in steps],
                    y=[network.evaluations[step].accuracy for step in steps],
                )
            )
    if not lines:
        return None
    axes = Panel(
        title="",
        x_label="training steps",
        y_label="test accuracy",
        x_log=True,
        y_range=(0.0, 1.0),
        y_percent=True,
        lines=lines,
    )
    return Chart(
        claim="",
        name="progress",
        title="Test accuracy so far",
        caption="One line for each network.",
        panels=[axes],
    )


def _ratio(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _networks(number: int) -> str:
    return "1 network has" if number == 1 else f"{number} networks have"
