"""The report of a pass: the outcome for each layer; `print(report)` is a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

Outcome = Literal[
    "fused",
    "swapped",
    "synchronized",
    "unsynchronized",
    "frozen",
    "unfrozen",
    "configured",
    "downgraded",
    "folded",
    "affine",
    "stripped",
    "measured",
    "inserted",
    "removed",
    "weakened",
    "zeroed",
    "recomputed",
    "left alone",
]


@dataclass(frozen=True)
class LayerReport:
    """The outcome for one layer.

    Args:
        name: its path in the model; "" is the model itself.
        outcome: "fused", "swapped", "synchronized", "unsynchronized", "frozen", "unfrozen", "configured", "downgraded",
            "folded", "affine", "stripped", "measured", "inserted", "removed", "weakened", "zeroed", "recomputed" or
            "left alone".
        what: what was fused into it ("relu", "residual, relu"), what of it was frozen or set, or torch's class that
            it became.
        why: why it was not fused, or left alone.

    Example:
        >>> import torch, batchnorm as bn
        >>> _, report = bn.upgrade(torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.ReLU()))
        >>> report["0"]
        LayerReport(name='0', outcome='fused', what='relu', why='')
    """

    name: str
    outcome: Outcome
    what: str = ""
    why: str = ""


@dataclass(frozen=True)
class Report:
    """The outcome for each normalization layer of a model, in the order of `named_modules`; it prints as a table.

    Args:
        layers: one for each layer.

    Example:
        >>> import torch, batchnorm as bn
        >>> _, report = bn.upgrade(torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.ReLU()))
        >>> print(report)
        0  fused  relu
        1 layer: 1 fused
    """

    layers: tuple[LayerReport, ...]

    def count(self, outcome: Outcome) -> int:
        """The number of layers with this outcome.

        Args:
            outcome: as of a `LayerReport`.

        Returns: how many there are.

        Example:
            >>> import torch, batchnorm as bn
            >>> _, report = bn.upgrade(torch.nn.BatchNorm1d(8))
            >>> report.count("swapped"), report.count("fused")
            (1, 0)
        """
        return sum(layer.outcome == outcome for layer in self.layers)

    @property
    def summary(self) -> str:
        """The number of layers with each outcome in one line, for example "20 layers: 17 fused, 3 swapped"."""
        found = Counter(layer.outcome for layer in self.layers)
        parts = [f"{found[outcome]} {outcome}" for outcome in get_args(Outcome) if found[outcome]]
        number = len(self.layers)
        return f"{number} layer{'' if number == 1 else 's'}" + (": " + ", ".join(parts) if parts else "")

    def __getitem__(self, name: str) -> LayerReport:
        """The outcome for the layer of that path in the model.

        Args:
            name: the path, as `named_modules` has it; "" is the model itself.

        Returns: its LayerReport.

        Raises:
            KeyError: no layer of that path was reported on; the message lists those that were.

        Example:
            >>> import torch, batchnorm as bn
            >>> _, report = bn.upgrade(torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Tanh()))
            >>> report["0"].what
            'tanh'
        """
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
