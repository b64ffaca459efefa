"""Freeze batch normalization: its statistics, its weight and bias, or both, whatever `.train()` says."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from batchnorm.passes.swap import become_ours, is_ours, layers_of
from batchnorm.statistics.population import Population, thawed

M = TypeVar("M", bound=nn.Module)


def freeze(model: M, stats: bool = True, affine: bool = False) -> M:
    """Let the batch normalization of `model` stay as it is; in place, and return `model`.

    stats: normalise by the running statistics, which no longer move, in training too. torch's layers, for which a
        `.train()` would end this, become ours; what a layer's `statistics` were is kept for `unfreeze`.
    affine: requires_grad=False for weight and bias.

    Raises: ValueError that names each layer that cannot become ours, or keeps no running statistics, and why; then
        nothing has been changed.
    """
    if stats:
        layers = layers_of(model)
        without = [name for name, layer in layers.items() if layer.running_mean is None]
        if without:
            raise ValueError(
                f"cannot freeze the statistics of {_listed(without)}: there are none "
                "(track_running_stats=False); affine=True with stats=False freezes weight and bias alone"
            )
        for layer in become_ours(layers):
            if not isinstance(layer.statistics, Population):
                layer.statistics = Population(layer.statistics)
    if affine:
        _require_gradients(model, False)
    return model


def unfreeze(model: M, stats: bool = True, affine: bool = True) -> M:
    """Undo `freeze`; in place, and return `model`.

    stats: each frozen layer gets the `statistics` back that it had.
    affine: requires_grad=True for weight and bias of every batch normalization, whoever froze them.
    """
    if stats:
        for layer in layers_of(model).values():
            if is_ours(layer):
                layer.statistics = thawed(layer.statistics)
    if affine:
        _require_gradients(model, True)
    return model


def _require_gradients(model: nn.Module, required: bool) -> None:
    for layer in layers_of(model).values():
        for values in (layer.weight, layer.bias):
            if values is not None:
                values.requires_grad_(required)


def _listed(names: list[str]) -> str:
    return ", ".join(name or "the model itself" for name in names)
