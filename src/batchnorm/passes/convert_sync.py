"""Batch normalization that takes the samples of all processes for one batch."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from batchnorm.graph.modules import is_ours, layers_of
from batchnorm.passes.report import LayerReport, Report
from batchnorm.passes.rollback import unchanged_on_failure
from batchnorm.passes.swap import convert_layers
from batchnorm.statistics.population import Population, thawed
from batchnorm.statistics.sync import Sync

M = TypeVar("M", bound=nn.Module)


def convert_sync(model: M, process_group: Any = None, *, revert: bool = False) -> tuple[M, Report]:
    """Let every batch normalization of `model` normalise by the samples of all ranks, in place.

    torch's layers and its SyncBatchNorm become ours with `statistics=Sync(process_group)`; parameters, buffers,
    hooks and state_dict keys stay. A layer that is frozen stays so, until `unfreeze`.

    Args:
        model: with layers of torch's or ours, its SyncBatchNorm among them.
        process_group: whose ranks; None: those that a SyncBatchNorm or Sync was given, or else all of them.
        revert: the way back: layers with Sync, and torch's SyncBatchNorm, which become ours for it, normalise by the
            samples of their own rank again; all others are left alone.

    Returns: `model` itself, and a Report that lists the layers.

    Raises:
        ValueError: names each layer that cannot become ours, or whose statistics Sync cannot be combined with, and
            why; then nothing has been changed.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model, report = bn.convert_sync(model)  # in every process, before DistributedDataParallel
        >>> model[1].statistics, report.summary
        (Sync(process_group=None), '1 layer: 1 synchronized')
        >>> model, report = bn.convert_sync(model, revert=True)
        >>> model[1].statistics, report.summary
        (None, '1 layer: 1 unsynchronized')
    """
    layers = layers_of(model)
    if revert:
        return model, _revert(model, layers)
    others = {
        f"layer {name!r}" if name else "the model itself": own
        for name, layer in layers.items()
        if is_ours(layer) and not isinstance(own := thawed(layer.statistics), Sync | None)
    }
    if others:
        listed = ", ".join(f"{name} has statistics={own!r}" for name, own in others.items())
        raise ValueError(
            f"{listed}, which cannot be combined with Sync: "
            "set layer.statistics = None first if Sync is to take its place"
        )
    groups = [process_group or _group(layer) for layer in layers.values()]
    with unchanged_on_failure(model):
        for layer, group in zip(convert_layers(layers), groups, strict=True):
            sync = Sync(group)
            layer.statistics = Population(sync) if isinstance(layer.statistics, Population) else sync
    return model, Report(tuple(LayerReport(name, "synchronized") for name in layers))


def _revert(model: nn.Module, layers: dict[str, nn.modules.batchnorm._BatchNorm]) -> Report:
    synchronized: dict[str, nn.modules.batchnorm._BatchNorm] = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, nn.SyncBatchNorm)
        or (is_ours(layer) and isinstance(thawed(layer.statistics), Sync))
    }
    with unchanged_on_failure(model):
        for layer in convert_layers(synchronized):
            layer.statistics = Population() if isinstance(layer.statistics, Population) else None
    return Report(
        tuple(
            LayerReport(name, "unsynchronized")
            if name in synchronized
            else LayerReport(name, "left alone", why="is not synchronized")
            for name in layers
        )
    )


def _group(layer: nn.Module) -> Any:
    own = thawed(layer.statistics) if is_ours(layer) else layer
    return getattr(own, "process_group", None)
