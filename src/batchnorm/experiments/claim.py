"""A claim of the paper as a value: which networks it needs, and what their curves say of it."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from batchnorm.records import Chart, Evaluation, Result, Table, Verdict


class Settings(BaseModel):
    """What a user may choose; with the data it decides every number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str
    seeds: int = Field(3, ge=1, description="networks are trained from seeds 0, 1, ...")
    claims: tuple[str, ...]


class Job(Protocol):
    """The configuration of one network, or of something else that a worker does."""

    @property
    def steps(self) -> int:
        """How many it takes."""

    @property
    def cost(self) -> float:
        """How long it takes, in a unit that an experiment's jobs share."""


S = TypeVar("S", bound=Settings)
J = TypeVar("J", bound=Job)


@dataclass
class Curve(Generic[J]):
    """What one network recorded: the evaluations, and the result once it has ended.

    checkpoint: where its state is.
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
    """What the curves say of a claim."""

    seen: bool
    measured: str
    tables: dict[str, Table]
    steps_ratio: dict[str, float] | None = None


class Claim(ABC, Generic[S, J]):
    """One claim. `name`, `title`, `source` and `expected` are those of its verdict."""

    name: str
    title: str
    source: str
    expected: str

    @abstractmethod
    def choices(self, settings: S) -> list[str]:
        """What the paper leaves open and we chose, a sentence each."""

    @abstractmethod
    def jobs(self, settings: S, curves: Curves) -> dict[str, J]:
        """The networks to train, by name, as far as they are known from the `curves` that have ended.

        Asked again whenever all of them have ended, so that later networks may depend on earlier ones.
        """

    @abstractmethod
    def charts(self, settings: S, curves: Curves) -> list[Chart]:
        """The pictures, of whatever curves there are."""

    @abstractmethod
    def find(self, settings: S, curves: Curves) -> Finding:
        """The finding, once every curve has ended."""

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
    """'mean ± standard deviation' of the values over seeds, or how many there are when some are missing."""
    values = list(values)
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return "not reached" if not there else f"reached by {len(there)} of {len(values)}"
    mean = pattern.format(statistics.fmean(there))
    whole = f"{mean} ± {pattern.format(statistics.stdev(there))}" if len(there) > 1 else mean
    return whole.replace("%", " %")


def over(seeds: int) -> str:
    """What numbers with a spread are, in a table's note."""
    return f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed"


def percent(share: float, digits: int = 1) -> str:
    """A share between 0 and 1 for people: '94.8 %'."""
    return f"{100 * share:.{digits}f} %"


def net(batch_norm: bool) -> Literal["bn", "plain"]:
    """The name of a network with or without batch normalization in jobs, and its role in a chart."""
    return "bn" if batch_norm else "plain"


def label(batch_norm: bool) -> str:
    """The name of a network with or without batch normalization for people."""
    return "with BN" if batch_norm else "without BN"
