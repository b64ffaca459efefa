"""Freeze batch normalization: its statistics, its weight and bias, or both, whatever `.train()` says."""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import nn

from batchnorm.graph.modules import is_ours, layers_of
from batchnorm.passes.report import LayerReport, Report
from batchnorm.passes.rollback import unchanged_on_failure
from batchnorm.passes.swap import convert_layers
from batchnorm.statistics.population import Population, thawed

M = TypeVar("M", bound=nn.Module)


def freeze(model: M, stats: bool = True, affine: bool = False) -> tuple[M, Report]:
    """Let the batch normalization of `model` stay as it is, in place.

    requires_grad=False stops neither running statistics nor their use of the batch, and `.eval()` ends with the next
    `.train()`; a frozen layer stays frozen until `unfreeze`.

    Args:
        model: with layers of torch's or ours.
        stats: normalise by the running statistics, which no longer move, in training too. torch's layers become ours
            for it; what a layer's `statistics` were is kept for `unfreeze`.
        affine: requires_grad=False for weight and bias.

    Returns: `model` itself, and a Report of what was frozen in each layer.

    Raises:
        ValueError: names each layer that cannot become ours, or keeps no running statistics, and why; then nothing
            has been changed.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> model, report = bn.freeze(model, affine=True)
        >>> report["1"].what
        'statistics, weight and bias'
        >>> before = model[1].running_mean.clone()
        >>> _ = model.train()(torch.randn(16, 4))
        >>> bool((model[1].running_mean == before).all())
        True
    """
    layers = layers_of(model)
    without = [name for name, layer in layers.items() if stats and layer.running_mean is None]
    if without:
        raise ValueError(
            f"cannot freeze the statistics of {_join_names(without)}: there are none "
            "(track_running_stats=False); affine=True with stats=False freezes weight and bias alone"
        )
    with unchanged_on_failure(model):
        for layer in convert_layers(layers) if stats else ():
            if not isinstance(layer.statistics, Population):
                layer.statistics = Population(layer.statistics)
        if affine:
            _require_gradients(model, False)
    return model, _report(layers, "frozen", stats, affine)


def unfreeze(model: M, stats: bool = True, affine: bool = True) -> tuple[M, Report]:
    """Undo `freeze`, in place.

    Args:
        model: what `freeze` was given.
        stats: each frozen layer gets the `statistics` back that it had.
        affine: requires_grad=True for weight and bias of every batch normalization, whoever froze them.

    Returns: `model` itself, and a Report of what follows the training again in each layer.

    Example:
        >>> import batchnorm as bn
        >>> layer, _ = bn.freeze(bn.BatchNorm1d(8, statistics=bn.Ghost(32)))
        >>> layer, report = bn.unfreeze(layer)
        >>> layer.statistics
        Ghost(size=32)
    """
    layers = layers_of(model)
    with unchanged_on_failure(model):
        for layer in layers.values() if stats else ():
            if is_ours(layer):
                layer.statistics = thawed(layer.statistics)
        if affine:
            _require_gradients(model, True)
    return model, _report(layers, "unfrozen", stats, affine)


def _require_gradients(model: nn.Module, required: bool) -> None:
    for layer in layers_of(model).values():
        for values in (layer.weight, layer.bias):
            if values is not None:
                values.requires_grad_(required)


def _join_names(names: list[str]) -> str:
    return ", ".join(name or "the model itself" for name in names)


def _report(
    layers: dict[str, nn.modules.batchnorm._BatchNorm],
    outcome: Literal["frozen", "unfrozen"],
    stats: bool,
    affine: bool,
) -> Report:
    def of_layer(name: str, layer: nn.modules.batchnorm._BatchNorm) -> LayerReport:
        parameters = [part for part in ("weight", "bias") if affine and getattr(layer, part) is not None]
        parts = ["statistics"] * stats + [" and ".join(parameters)] * bool(parameters)
        if parts:
            return LayerReport(name, outcome, ", ".join(parts))
        return LayerReport(
            name, "left alone", why="has neither weight nor bias" if affine else "nothing was asked for"
        )

    return Report(tuple(of_layer(name, layer) for name, layer in layers.items()))
