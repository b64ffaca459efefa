"""What checks look at: a model with its layers and, where they are given, an optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from batchnorm.graph.modules import has_statistics, is_ours, layers_of
from batchnorm.statistics.population import Population

Layer = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Subject:
    """A model that is examined; nothing of it is changed.

    model: as its user has it, in any mode.
    optimizer: that trains it, if it is given.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Batch normalization of torch's classes and ours, and their subclasses, by path."""
        return layers_of(self.model)

    @cached_property
    def tracking(self) -> dict[str, Layer]:
        """Those that keep running statistics."""
        return {path: layer for path, layer in self.layers.items() if has_statistics(layer)}

    @staticmethod
    def is_frozen(layer: nn.Module) -> bool:
        """Whether `bn.freeze` has frozen its statistics."""
        return is_ours(layer) and isinstance(layer.statistics, Population)
