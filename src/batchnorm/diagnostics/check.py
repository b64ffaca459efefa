"""A check, and all of them."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from batchnorm.diagnostics.finding import Finding, Severity
from batchnorm.diagnostics.subject import Need, Subject


@dataclass
class Case:
    """A healthy network, into which the tests plant a bug.

    model: anybody's, its population statistics measured over `batches`.
    path: of the layer at which it is planted; afterwards, that at which it must be found.
    before: the path of the convolution before the layer.
    batches: of its training.
    optimizer: that trains the model.
    options: further arguments of `examine`.
    """

    model: Any
    path: str
    before: str
    batches: list[Any]
    optimizer: Any
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def layer(self) -> Any:
        return self.model.get_submodule(self.path)

    @property
    def convolution(self) -> Any:
        return self.model.get_submodule(self.before)

    def replace(self, path: str, module: nn.Module) -> None:
        """Put a module at a path."""
        parent, _, name = path.rpartition(".")
        self.model.get_submodule(parent)._modules[name] = module


class Check(ABC):
    """What one kind of bug looks like.

    code: stable, "BN201".
    name: in words with hyphens, for people.
    severity: of its findings, unless one says otherwise.
    symptom: what a user sees.
    why: what happens, in a sentence or two.
    source: where that is known from.
    needs: what it looks at beside the model.
    yields_to: checks whose findings at a layer explain its own there, which are then left out.
    follows: likewise, at a layer before.
    on_request: whether it is made only where it is selected, as it takes long.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    severity: ClassVar[Severity]
    symptom: ClassVar[str]
    why: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]] = ()
    yields_to: ClassVar[tuple[str, ...]] = ()
    follows: ClassVar[tuple[str, ...]] = ()
    on_request: ClassVar[bool] = False

    @abstractmethod
    def find(self, subject: Subject) -> Iterator[Finding]:
        """The bugs of this kind."""

    def fix(self, subject: Subject, finding: Finding) -> str:
        """Mend it and say what was changed; "" where that is not safe."""
        return ""

    @abstractmethod
    def plant(self, case: Case) -> None:
        """Make the layer of the case have the bug, for the tests."""

    @property
    def fixes(self) -> bool:
        """Whether it can mend what it finds."""
        return type(self).fix is not Check.fix

    def finding(
        self,
        layer: str,
        message: str,
        fix: str,
        *,
        severity: Severity | None = None,
        **evidence: float | int | str,
    ) -> Finding:
        return Finding(self.code, severity or self.severity, layer, message, dict(evidence), fix)


@cache
def checks() -> tuple[Check, ...]:
    """One of each, by code."""
    from batchnorm.diagnostics import checks as package

    found = []
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        kinds = [each for each in vars(loaded).values() if isinstance(each, type) and issubclass(each, Check)]
        found += [kind() for kind in kinds if kind.__module__ == loaded.__name__]
    return tuple(sorted(found, key=lambda each: each.code))


def shown(value: float | Tensor) -> str:
    """A number to three digits."""
    return f"{float(value):.3g}"


def plural(number: int, noun: str) -> str:
    """A number of things: 1 channel, 3 channels, 2 batches."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith(('ch', 'ss')) else 's'}"
