"""What checks have found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from batchnorm.diagnostics.shift_meter import ShiftMeter

Severity = Literal["error", "warning", "info"]
Evidence = dict[str, float | int | str]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One bug, at one layer.

    Args:
        code: of the check, "BN201".
        severity: "error": what is computed is wrong or will be; "warning": it probably is; "info": it can be better.
        layer: its path in the model; "" for the whole model.
        message: what is wrong, in a sentence.
        evidence: the numbers that show it, by name.
        fix: a call, or a line to change.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8, momentum=0.99))
        >>> finding = bn.examine(model, select=["BN201"])[0]
        >>> finding.layer, finding.evidence
        ('1', {'momentum': 0.99})
    """

    code: str
    severity: Severity
    layer: str
    message: str
    evidence: Evidence = field(default_factory=dict)
    fix: str = ""


@dataclass(frozen=True)
class Fixed:
    """A finding that is mended, and what was changed.

    Args:
        finding: as it was.
        change: "momentum 0.99 → 0.01".
    """

    finding: Finding
    change: str


@dataclass(frozen=True)
class Examined:
    """A layer that was examined, and what was measured of it, where there were batches.

    Args:
        path: in the model.
        kind: its class and width, "BatchNorm2d(64)".
        gap: between its outputs in evaluation and in training, in their standard deviations.
        by_chance: the gap that exact statistics would have, by the number of examples.
        values: the fewest per channel in a batch.
        noise: by how much a batch's statistics move its outputs, in their standard deviations.
    """

    path: str
    kind: str
    gap: float | None = None
    by_chance: float | None = None
    values: int | None = None
    noise: float | None = None


class Findings(Sequence[Finding]):
    """Findings, the worst first, then in the order of the model; they print as a table, in a notebook too.

    Args:
        findings: in the order of the model.
        skipped: why checks were not made, by code.
        fixed: what was mended; it is no longer among the findings.
        layers: those that were examined, in the order of the model.

    Example:
        >>> import torch, batchnorm as bn
        >>> findings = bn.examine(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8, momentum=0.99)))
        >>> len(findings.of("warning")), findings.of("error")
        (1, [])
    """

    def __init__(
        self,
        findings: Sequence[Finding],
        skipped: Mapping[str, str] | None = None,
        fixed: Sequence[Fixed] = (),
        layers: Sequence[Examined] = (),
    ) -> None:
        self._findings = sorted(findings, key=lambda each: SEVERITIES.index(each.severity))
        self.skipped = dict(skipped or {})
        self.fixed = tuple(fixed)
        self.layers = tuple(layers)

    @overload
    def __getitem__(self, index: int) -> Finding: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Finding]: ...

    def __getitem__(self, index: int | slice) -> Finding | Sequence[Finding]:
        return self._findings[index]

    def __len__(self) -> int:
        return len(self._findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._findings)

    def of(self, severity: Severity) -> list[Finding]:
        """Those of this severity."""
        return [each for each in self if each.severity == severity]

    def at(self, layer: str) -> list[Finding]:
        """Those at the layer of this path; "" is the whole model."""
        return [each for each in self if each.layer == layer]

    @property
    def summary(self) -> str:
        """How many there are of each severity, in a line."""
        counts = [(len(self.of(severity)), severity) for severity in SEVERITIES]
        found = [
            f"{number} {severity}{'s' * (number != 1 and severity != 'info')}"
            for number, severity in counts
            if number
        ]
        parts = [", ".join(found) or "nothing found"]
        if self.fixed:
            parts.append(f"{len(self.fixed)} fixed")
        if self.skipped:
            parts.append(f"{len(self.skipped)} check{'s' * (len(self.skipped) != 1)} not made")
        return "; ".join(parts)

    def __str__(self) -> str:
        rows = [(each.code, each.severity, each.layer or "(the model)") for each in self]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = [
            f"fixed {each.finding.code} {each.finding.layer or '(the model)'}: {each.change}"
            for each in self.fixed
        ]
        for row, each in zip(rows, self, strict=True):
            cells = "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
            lines.append(f"{cells}  {each.message}" + (f"; {each.fix}" if each.fix else ""))
        return "\n".join([*lines, self.summary])

    __repr__ = __str__

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it: findings, fixed, skipped, layers; a number that is not finite as a word."""
        return {
            "findings": [_as_json(each) for each in self],
            "fixed": [_as_json(each.finding) | {"change": each.change} for each in self.fixed],
            "skipped": self.skipped,
            "layers": [vars(each) for each in self.layers],
        }

    def save(self, path: str | Path, title: str = "model", meter: ShiftMeter | None = None) -> None:
        """Write a file: a page to look at (.html), JSON (.json), SARIF (.sarif) or GitHub's annotations (.txt).

        Args:
            path: whose suffix says what is written; an old file is replaced when the new one is whole.
            title: the model's name.
            meter: a ShiftMeter, whose distributions over time are shown on the page.

        Raises:
            ValueError: another suffix.
            ImportError: names the packages that a page needs.

        Example:
            >>> import tempfile, torch, batchnorm as bn
            >>> findings = bn.examine(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8)))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     findings.save(f"{folder}/findings.json")
        """
        from batchnorm.diagnostics.written import save

        save(self, Path(path), title, () if meter is None else meter.history)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("code", "severity", "layer", "finding", "fix"))
        body = "".join(
            "<tr>"
            + "".join(
                f"<td style='text-align:left'>{escape(text)}</td>"
                for text in (each.code, each.severity, each.layer or "(the model)", each.message, each.fix)
            )
            + "</tr>"
            for each in self
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if self else ""
        return f"{table}<p>{escape(self.summary)}</p>"


def _as_json(finding: Finding) -> dict[str, Any]:
    evidence = {
        name: value if not isinstance(value, float) or value - value == 0 else str(value)
        for name, value in finding.evidence.items()
    }
    return {**vars(finding), "evidence": evidence}
