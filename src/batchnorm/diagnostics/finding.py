"""What a check has found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

Severity = Literal["error", "warning", "info"]
_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}


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
    """

    code: str
    severity: Severity
    layer: str
    message: str
    evidence: dict[str, float | int | str] = field(default_factory=dict)
    fix: str = ""


class Findings(Sequence[Finding]):
    """Findings, the worst first, then in the order of the model; they print as a table."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self._findings = sorted(findings, key=lambda each: _ORDER[each.severity])

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

    @property
    def summary(self) -> str:
        """How many there are of each severity, in a line."""
        counts = [(len(self.of(severity)), severity) for severity in _ORDER]
        found = [
            f"{number} {severity}{'s' * (number != 1 and severity != 'info')}"
            for number, severity in counts
            if number
        ]
        return ", ".join(found) or "nothing found"

    def __str__(self) -> str:
        rows = [(each.code, each.severity, each.layer or "(the model)") for each in self]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = []
        for row, each in zip(rows, self, strict=True):
            cells = "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
            lines.append(f"{cells}  {each.message}" + (f"; {each.fix}" if each.fix else ""))
        return "\n".join([*lines, self.summary])

    __repr__ = __str__
