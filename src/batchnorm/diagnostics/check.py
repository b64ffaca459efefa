"""A check, and all of them."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from typing import ClassVar

from torch import nn

from batchnorm.diagnostics.finding import Finding, Severity
from batchnorm.diagnostics.subject import Subject


class Check(ABC):
    """What one kind of bug looks like.

    code: stable, "BN201".
    name: in words with hyphens, for people.
    severity: of its findings.
    symptom: what a user sees.
    why: what happens, in a sentence or two.
    source: where that is known from.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    severity: ClassVar[Severity]
    symptom: ClassVar[str]
    why: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def find(self, subject: Subject) -> Iterator[Finding]:
        """The bugs of this kind."""

    def fix(self, model: nn.Module, finding: Finding) -> None:
        """Mend it, where that is safe."""
        raise NotImplementedError(f"{self.code} has no safe fix: {finding.fix}")

    @abstractmethod
    def plant(self, model: nn.Module, path: str) -> None:
        """Make the layer of that path have the bug, for the tests."""

    def finding(self, layer: str, message: str, fix: str, **evidence: float | int | str) -> Finding:
        return Finding(self.code, self.severity, layer, message, dict(evidence), fix)


@cache
def checks() -> tuple[Check, ...]:
    """One of each, by code."""
    from batchnorm.diagnostics import checks as package

    found = []
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        kinds = [each for each in vars(loaded).values() if isinstance(each, type) and issubclass(each, Check)]
        found += [kind() for kind in kinds if kind is not Check]
    return tuple(sorted(found, key=lambda each: each.code))
