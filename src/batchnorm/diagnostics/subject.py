"""What checks look at: a model with its layers, and what was seen of it in batches, a step, its optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from batchnorm.diagnostics.backward import Updates, updates
from batchnorm.diagnostics.layer import is_batch_norm, is_frozen
from batchnorm.diagnostics.measured import Measured, measure
from batchnorm.diagnostics.neighbours import Leak, leaks
from batchnorm.diagnostics.rank_digests import of_all_ranks
from batchnorm.diagnostics.runs import Runs
from batchnorm.diagnostics.structure import Before, Structure, structure
from batchnorm.graph.modules import has_statistics

if TYPE_CHECKING:
    from batchnorm.diagnostics.watching import Steps

Need = Literal[
    "structure", "measured", "leaks", "updates", "optimizer", "state", "reference", "ranks", "steps"
]
Found = TypeVar("Found")
Use = Literal["training", "inference", "export", "private", "federated"]
USES: tuple[Use, ...] = ("training", "inference", "export", "private", "federated")


class Missing(Exception):
    """Something that a check needs is not there; the message says why."""


def _got(found: Found | str) -> Found:
    """What was found. Raises: Missing with the reason, where that is it."""
    if isinstance(found, str):
        raise Missing(found)
    return found


@dataclass
class Subject:
    """A model that is examined; nothing of it is changed.

    model: as its user has it, in any mode.
    runs: how it is called, with which batches.
    optimizer: that trains it, if it is given.
    state: a state_dict that is to be loaded, if it is given.
    reference: the model as it was trained, if it is given.
    use: what the model is for.
    loader: the batches as they were given.
    steps: what was seen of a training.
    """

    model: nn.Module
    runs: Runs
    optimizer: torch.optim.Optimizer | None = None
    state: Mapping[str, Any] | None = None
    reference: nn.Module | None = None
    use: Use | None = None
    loader: Any = None
    steps: Steps | None = None

    @cached_property
    def layers(self) -> dict[str, Any]:
        """Batch normalization of any library, by path; a layer that has several paths once."""
        return {path: module for path, module in self.model.named_modules() if is_batch_norm(module)}

    @cached_property
    def tracking(self) -> dict[str, Any]:
        """Those that keep running statistics, frozen ones too."""
        return {path: layer for path, layer in self.layers.items() if has_statistics(layer)}

    @cached_property
    def learning(self) -> dict[str, Any]:
        """Those whose running statistics follow the batches."""
        return {
            path: layer
            for path, layer in self.tracking.items()
            if not is_frozen(layer) and getattr(layer, "track_running_stats", True)
        }

    @cached_property
    def evaluated(self) -> dict[str, Any]:
        """Those that evaluation calls, and not a training alone, as an auxiliary head."""
        called = self.runs.called(self.learning)
        return {path: layer for path, layer in self.learning.items() if path in called}

    @cached_property
    def structure(self) -> Structure:
        """What computes what, as seen in a run. Raises: Missing."""
        return _got(structure(self.runs))

    def firsts(self) -> Iterator[tuple[str, Before]]:
        """Of each layer that is called, what is before its first call. Raises: Missing."""
        for path, layer in self.layers.items():
            for call in self.structure.calls_of(layer)[:1]:
                yield path, self.structure.before(call)

    def gets_activations(self, path: str) -> bool:
        """Whether a nonlinearity makes a layer's input: units that are 0 for all of a few images are no bug of it."""
        try:
            befores = [self.structure.before(call) for call in self.structure.calls_of(self.layers[path])]
        except Missing:
            return False
        return any(each.nonlinear and not each.linear for each in befores)

    @cached_property
    def measured(self) -> Measured:
        """What came to each layer in the batches. Raises: Missing."""
        return _got(measure(self._with_batches(), self.learning))

    @cached_property
    def leaks(self) -> list[Leak]:
        """The modules by which examples of a batch change each other's outputs in evaluation. Raises: Missing."""
        return _got(leaks(self._with_batches()))

    @cached_property
    def ranks(self) -> list[dict[str, str]]:
        """Digests of the running statistics of each process, by path. Raises: Missing."""
        return _got(of_all_ranks(self.tracking))

    @cached_property
    def updates(self) -> Updates:
        """How often each layer moved its statistics in a forward and backward pass. Raises: Missing."""
        return _got(updates(self._with_batches(), self.learning))

    def _with_batches(self) -> Runs:
        """Runs that have some. Raises: Missing."""
        if not self.runs.batches:
            raise Missing("it needs batches: examine(model, loader)")
        return self.runs

    def measure_again(self, path: str) -> str:
        """Write what the batches have into a layer's running statistics; return what was done, "" without batches."""
        try:
            found = self.measured.layers.get(path)
        except Missing:
            return ""
        if found is None:
            return ""
        layer = self.layers[path]
        with torch.no_grad():
            for buffer, values in ((layer.running_mean, found.mean), (layer.running_var, found.variance)):
                buffer.copy_(values.view_as(buffer))
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(len(found.arrivals))
        return f"running statistics → those of {found.samples:,} examples in {self.measured.batches} batches"

    def require(self, needs: Sequence[Need]) -> None:
        """Raise Missing if one of these things is not there."""
        for need in needs:
            if getattr(self, need) is None:
                raise Missing(_GIVE[need])


_GIVE: dict[str, str] = {
    "optimizer": "it needs the optimizer: examine(model, optimizer=optimizer)",
    "state": "it needs a state_dict: examine(model, state=torch.load(file, weights_only=True))",
    "reference": "it needs the model that was trained: examine(model, reference=trained)",
    "steps": "it needs training steps: with bn.watch(model, optimizer)",
}
