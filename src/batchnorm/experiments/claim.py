"""A claim of the paper: the networks that it needs, and its verdict from their curves."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from batchnorm.records import Chart, Evaluation, Result, Table, Verdict

CLAIMS = "claims to test, separated by commas, or 'all'; 'list' shows them"


class Settings(BaseModel):
    """The settings of an experiment. Together with the data they determine every number of its run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str
    seeds: int = Field(3, ge=1, description="number of seeds, 0, 1, ..., over which the verdict averages")
    claims: tuple[str, ...] = Field(description=CLAIMS)


class Job(Protocol):
    """The configuration of a job of a worker: the training of a network, or a prediction."""

    @property
    def steps(self) -> int:
        """The number of steps."""

    @property
    def cost(self) -> float:
        """The expected duration, in a unit that all jobs of an experiment share."""


S = TypeVar("S", bound=Settings)
J = TypeVar("J", bound=Job)


@dataclass
class Curve(Generic[J]):
    """The records of one network: its evaluations, and its result once it has ended.

    checkpoint: the path of its checkpoint.
    """

    config: J
    evaluations: list[Evaluation] = field(default_factory=list)
    result: Result | None = None
    checkpoint: Path | None = None

    def steps_to(self, accuracy: float) -> int | None:
        """The first evaluated step with at least this test accuracy."""
        return next((e.step for e in self.evaluations if e.accuracy >= accuracy), None)

    @property
    def best_accuracy(self) -> float:
        """The highest test accuracy of all evaluations."""
        return max((e.accuracy for e in self.evaluations), default=0.0)


Curves = Mapping[str, Curve[Any]]


@dataclass(frozen=True)
class Finding:
    """The outcome of a claim, from the curves."""

    seen: bool
    measured: str
    tables: dict[str, Table]
    steps_ratio: dict[str, float] | None = None


class Claim(ABC, Generic[S, J]):
    """A claim. `name`, `title`, `source` and `expected` appear in its verdict."""

    name: str
    title: str
    source: str
    expected: str

    @abstractmethod
    def choices(self, settings: S) -> list[str]:
        """The choices that the paper leaves open, one sentence each."""

    @abstractmethod
    def jobs(self, settings: S, curves: Curves) -> dict[str, J]:
        """The networks to train, by name, as far as they are known from the finished `curves`.

        Called again when all of them have ended, so that later networks may depend on earlier ones.
        """

    @abstractmethod
    def charts(self, settings: S, curves: Curves) -> list[Chart]:
        """The figures, of the curves so far."""

    @abstractmethod
    def find(self, settings: S, curves: Curves) -> Finding:
        """The finding; called when every curve has ended."""

    def verdict(self, settings: S, curves: Curves) -> Verdict:
        """The verdict: that of `find` when every network has ended, else "incomplete"."""
        outcome: Literal["seen", "not seen here", "incomplete"]
        jobs = self.jobs(settings, curves)
        ended = sum(name in curves and curves[name].result is not None for name in jobs)
        if ended == len(jobs):
            finding = self.find(settings, curves)
            outcome = "seen" if finding.seen else "not seen here"
        else:
            finding = Finding(
                False, f"The run was stopped when {ended} of {len(jobs)} networks had ended.", {}
            )
            outcome = "incomplete"
        return Verdict(
            claim=self.name,
            title=self.title,
            source=self.source,
            expected=self.expected,
            measured=finding.measured,
            outcome=outcome,
            choices=self.choices(settings),
            tables=finding.tables,
            steps_ratio=finding.steps_ratio,
        )


def spread(values: Iterable[float | None], pattern: str = "{:,.0f}") -> str:
    """'mean ± standard deviation' of the values over seeds, or how many seeds have a value if some are None."""
    values = list(values)
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return "not reached" if not present else f"reached by {len(present)} of {len(values)}"
    mean = pattern.format(statistics.fmean(present))
    text = f"{mean} ± {pattern.format(statistics.stdev(present))}" if len(present) > 1 else mean
    return text.replace("%", " %")


def seeds_note(seeds: int) -> str:
    """The note of a table with mean and standard deviation over `seeds` seeds."""
    return f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed"


def percent(share: float, digits: int = 1) -> str:
    """A share between 0 and 1 as a percentage: '94.8 %'."""
    return f"{100 * share:.{digits}f} %"


def role(batch_norm: bool) -> Literal["bn", "plain"]:
    """The role of a network with or without batch normalization, in the names of jobs and in charts."""
    return "bn" if batch_norm else "plain"


def label(batch_norm: bool) -> str:
    """The label of a network with or without batch normalization."""
    return "with BN" if batch_norm else "without BN"
