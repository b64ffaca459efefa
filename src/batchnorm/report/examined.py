"""What an examination of a model is told by, as plain data: a page, SARIF and annotations are written from it.

Findings are rows as `Findings.as_dict()` makes them: `Examined.of(title, findings.as_dict())`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
THE_MODEL = "(the model)"  # what stands for the path ""


class Row(TypedDict):
    """A finding."""

    code: str
    severity: Severity
    layer: str
    message: str
    evidence: Mapping[str, float | int | str]
    fix: str


class FixedRow(Row):
    """A finding that is mended, and what was changed."""

    change: str


@dataclass(frozen=True)
class Explained:
    """What a check is about: its name in words with hyphens, and the severity that its findings have as a rule."""

    name: str
    severity: Severity
    symptom: str
    why: str
    source: str


@dataclass(frozen=True)
class Layer:
    """A layer, and what was measured of it.

    path: in the model; "" is the model itself.
    kind: "BatchNorm2d(64)".
    gap: between its outputs in evaluation and in training, in their standard deviations.
    by_chance: the gap that exact statistics would have, by the number of examples.
    values: the fewest per channel of a batch.
    noise: by how much a batch's statistics move its outputs, in their standard deviations.
    """

    path: str
    kind: str
    gap: float | None = None
    by_chance: float | None = None
    values: int | None = None
    noise: float | None = None


@dataclass(frozen=True)
class Shift:
    """How what comes to a layer moved in a training.

    steps: at which it was looked at.
    p15, p50, p85: percentiles at each of them; nan where there was nothing.
    drift: how far the mean moved since the step before, in standard deviations.
    """

    layer: str
    steps: Sequence[float]
    p15: Sequence[float]
    p50: Sequence[float]
    p85: Sequence[float]
    drift: Sequence[float]


@dataclass(frozen=True)
class Examined:
    """An examination.

    title: the model's name.
    findings, fixed, skipped: as of `Findings.as_dict()`.
    layers: in the order of the model.
    checks: what those are about whose codes appear, by code.
    shift: of a training that was watched.
    command: that made it; "" in a notebook.
    versions: by package.
    date: ISO 8601, or "".
    """

    title: str
    findings: Sequence[Row] = ()
    fixed: Sequence[FixedRow] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    layers: Sequence[Layer] = ()
    checks: Mapping[str, Explained] = field(default_factory=dict)
    shift: Sequence[Shift] = ()
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    @classmethod
    def of(cls, title: str, found: Mapping[str, Any], **more: Any) -> Examined:
        """What `Findings.as_dict()` has, and further fields."""
        layers = [
            Layer(**{name: _number(value) for name, value in each.items()})
            for each in found.get("layers", ())
        ]
        return cls(title, found["findings"], found["fixed"], found["skipped"], layers, **more)

    @property
    def worst_first(self) -> list[Row]:
        """The findings by severity, those of one severity in their order."""
        return sorted(self.findings, key=lambda each: SEVERITIES.index(each["severity"]))

    def name(self, code: str) -> str:
        """The name of a check; "" where nothing is said about it."""
        return self.checks[code].name if code in self.checks else ""


def sentence(row: Row) -> str:
    """The message of a finding and its fix on one line of text."""
    message = row["message"]
    end = "" if message.endswith((".", "?", "!")) else "."
    return f"{message}{end} {row['fix']}".rstrip()


def _number(value: Any) -> Any:
    """JSON has inf and nan as words."""
    return float(value) if value in ("inf", "-inf", "nan") else value
