"""What checks look at: a model with its layers, and what was seen of it in batches, a step, its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from batchnorm.diagnostics.backward import Updates, updates
from batchnorm.diagnostics.measured import Measured, measure
from batchnorm.diagnostics.neighbours import Leak, leaks
from batchnorm.diagnostics.runs import Runs
from batchnorm.diagnostics.structure import Structure, structure
from batchnorm.graph.modules import has_statistics, is_normalization, is_ours
from batchnorm.statistics.population import Population
from batchnorm.statistics.sync import Sync
from batchnorm.statistics.population import thawed

if TYPE_CHECKING:
    from batchnorm.diagnostics.watching import Steps

Use = Literal["training", "inference", "export", "private", "federated"]
USES: tuple[Use, ...] = ("training", "inference", "export", "private", "federated")


class Missing(Exception):
    """Something that a check needs is not there; the message says why."""


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
    ranks: Sequence[Mapping[str, str]] = ()

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

    def path_of(self, module: nn.Module) -> str:
        """The path of a module in the model."""
        return self._paths.get(module, "")

    @cached_property
    def _paths(self) -> dict[nn.Module, str]:
        return {module: path for path, module in reversed(list(self.model.named_modules()))}

    @cached_property
    def structure(self) -> Structure:
        """What computes what, as seen in a run. Raises: Missing."""
        return self._got(structure(self.runs))

    @cached_property
    def measured(self) -> Measured:
        """What came to each layer in the batches. Raises: Missing."""
        if not self.runs.batches:
            raise Missing("it needs batches: examine(model, loader)")
        return self._got(measure(self.runs, self.learning))

    @cached_property
    def leaks(self) -> list[Leak]:
        """The modules by which examples of a batch change each other's outputs in evaluation. Raises: Missing."""
        if not self.runs.batches:
            raise Missing("it needs batches: examine(model, loader)")
        return self._got(leaks(self.runs))

    @cached_property
    def updates(self) -> Updates:
        """How often each layer moved its statistics in a forward and backward pass. Raises: Missing."""
        if not self.runs.batches:
            raise Missing("it needs batches: examine(model, loader)")
        return self._got(updates(self.runs, self.learning))

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

    @staticmethod
    def _got(found: Any) -> Any:
        if isinstance(found, str):
            raise Missing(found)
        return found

    def lacks(self, needs: Sequence[str]) -> str | None:
        """Why one of these things is not there, or None if all are."""
        for need in needs:
            try:
                if need == "structure":
                    _ = self.structure
                elif need == "batches":
                    _ = self.measured
                elif need == "neighbours":
                    _ = self.leaks
                elif need == "backward":
                    _ = self.updates
                elif getattr(self, need) is None or (need == "ranks" and not self.ranks):
                    return _GIVE[need]
            except Missing as why:
                return str(why)
        return None


_GIVE = {
    "optimizer": "it needs the optimizer: examine(model, optimizer=optimizer)",
    "state": "it needs a state_dict: examine(model, state=torch.load(file, weights_only=True))",
    "reference": "it needs the model that was trained: examine(model, reference=trained)",
    "ranks": "it needs several processes, each of which examines its model",
    "steps": "it needs training steps: with bn.watch(model, optimizer)",
}


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is a layer of batch normalization, of whatever library, and not a block that has one in it."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    own = has_statistics(module) and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
    return own and is_normalization(module)


def is_frozen(layer: nn.Module) -> bool:
    """Whether its statistics stay as they are in training too: by `bn.freeze`, or by its class."""
    if is_ours(layer):
        return isinstance(layer.statistics, Population)
    return not isinstance(layer, nn.modules.batchnorm._BatchNorm) and not hasattr(layer, "momentum")


def is_synchronized(layer: nn.Module) -> bool:
    """Whether it normalises by the batch of all processes."""
    if is_ours(layer):
        return isinstance(thawed(layer.statistics), Sync)
    return isinstance(layer, nn.SyncBatchNorm)


def statistics(layer: Any) -> tuple[Tensor, Tensor]:
    """Running mean and variance in float64."""
    return layer.running_mean.detach().double(), layer.running_var.detach().double()


def batches_tracked(layer: Any) -> int | None:
    """How many batches it has seen; None where it does not count."""
    count = getattr(layer, "num_batches_tracked", None)
    return None if count is None else int(count)


def is_initial(layer: Any) -> bool:
    """Whether its statistics are the 0 and 1 with which they begin."""
    mean, variance = layer.running_mean, layer.running_var
    return bool((mean == 0).all()) and bool((variance == 1).all())
