"""The report of a pass: the outcome for each layer; `print(report)` is a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

Outcome = Literal["fused", "swapped", "synchronized", "frozen", "unfrozen", "left alone"]


@dataclass(frozen=True)
class LayerReport:
    """The outcome for one layer."""

    name: str  # its path in the model; "" is the model itself
    outcome: Outcome
    what: str = ""  # what was fused into it ("relu", "residual, relu"), or what of it was frozen
    why: str = ""  # why it was not fused, or left alone


@dataclass(frozen=True)
class Report:
    """The outcome for each normalization layer of a model, in the order of `named_modules`."""

    layers: tuple[LayerReport, ...]

    def count(self, outcome: Outcome) -> int:
        return sum(layer.outcome == outcome for layer in self.layers)

    @property
    def summary(self) -> str:
        """For example "20 layers: 17 fused, 3 swapped"."""
        found = Counter(layer.outcome for layer in self.layers)
        parts = [f"{found[outcome]} {outcome}" for outcome in get_args(Outcome) if found[outcome]]
        number = len(self.layers)
        return f"{number} layer{'' if number == 1 else 's'}" + (": " + ", ".join(parts) if parts else "")

    def __getitem__(self, name: str) -> LayerReport:
        """The layer of that path in the model."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(
            f"{name!r} is not among the layers reported on: {[layer.name for layer in self.layers]}"
        )

    def __str__(self) -> str:
        rows = [
            (layer.name or "(the model)", layer.outcome, ": ".join(filter(None, (layer.what, layer.why))))
            for layer in self.layers
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        lines = [
            f"{name:{widths[0]}}  {outcome:{widths[1]}}  {text}".rstrip() for name, outcome, text in rows
        ]
        return "\n".join([*lines, self.summary])

    __repr__ = __str__
