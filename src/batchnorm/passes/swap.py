"""Convert a layer of torch's to ours, and back, by changing its class; the object stays the same.

So all references stay valid: those of several parents, of an optimizer (to its parameters), of hooks and of lists in
the model's forward. torch.nn.utils.parametrize changes a module's class in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from batchnorm import layers
from batchnorm.graph.modules import activation_of, has_hooks, is_ours, is_patched
from batchnorm.layers import OURS, _BatchNorm
from batchnorm.running.buffers import narrow
from batchnorm.statistics.population import thawed
from batchnorm.statistics.sync import Sync

_ANY_RANK = {**OURS, nn.SyncBatchNorm: layers.BatchNorm}


def convert_layers(layers: dict[str, nn.modules.batchnorm._BatchNorm]) -> list[_BatchNorm]:
    """Convert `layers` of torch, including SyncBatchNorm, to ours; return all `layers`.

    Raises: ValueError that names the layers that cannot be converted, and why; then no layer has been changed.
    """
    kept = {name: obstacle(each, _ANY_RANK) for name, each in layers.items() if not is_ours(each)}
    reasons = [f"{name or 'the model itself'} {why}" for name, why in kept.items() if why is not None]
    if reasons:
        raise ValueError("these layers cannot become batchnorm's: " + "; ".join(reasons))
    for name in kept:
        swap(layers[name])
    return [each for each in layers.values() if is_ours(each)]


def obstacle(layer: nn.Module, ours: Mapping[type[nn.Module], type[_BatchNorm]] = OURS) -> str | None:
    """Why `layer` cannot be converted to one of `ours`, or None."""
    kind = type(layer)
    if is_ours(layer):
        return "is ours already"
    if isinstance(layer, torch.jit.ScriptModule):
        return "is compiled by torch.jit: upgrade the model before it is scripted or traced"
    if parametrize.is_parametrized(layer):
        return "has parametrizations"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "is lazy: run a batch through the model first"
    if kind is nn.SyncBatchNorm and kind not in ours:
        return "is SyncBatchNorm: bn.convert_sync makes it ours"
    if isinstance(layer, _BatchNorm):
        return f"is {kind.__name__} of {kind.__module__}, which has a forward of its own"
    if kind not in ours and not is_timm_s(layer):
        return f"is {kind.__name__} of {kind.__module__}, not exactly a layer of torch's"
    if is_patched(layer):
        return "its forward was replaced on the instance"
    for table, names in ((layer._parameters, ("weight", "bias")), (layer._buffers, _STATISTICS)):
        for name in names:
            if name not in table:
                return f"its {name} is not a plain one (weight_norm, pruning, ...)"
    for name in ("activation", "statistics", "debiased", "on_single", "domains", "num_batches_skipped"):
        if hasattr(layer, name):
            return f"has an attribute {name} of its own, a name that ours needs"
    if is_timm_s(layer):
        if type(layer.drop) is not nn.Identity:
            return f"drops between normalization and activation ({layer.drop})"
        if has_hooks(layer.drop):
            return "its drop has hooks"
    return None


def swap(layer: nn.Module) -> None:
    """Convert `layer`, which has no `obstacle`, to ours."""
    timm_layer = is_timm_s(layer)
    kind = _ANY_RANK[nn.BatchNorm2d if timm_layer else type(layer)]
    group = vars(layer).pop("process_group", None)
    statistics = Sync(group) if type(layer) is nn.SyncBatchNorm else None
    layer.__class__ = kind
    assert isinstance(layer, _BatchNorm)
    layer._begin_tracking()
    for name, value in vars(kind(1, affine=False, track_running_stats=False)).items():
        vars(layer).setdefault(name, value)  # the attributes that only ours has
    layer.statistics = statistics
    act = layer._modules.get("act") if timm_layer else None
    if act is not None and (type(act) is not nn.Identity or has_hooks(act)):
        activation = None if has_hooks(act) else activation_of(act)
        # not as a child: it is registered as `act` already, and must not be in the state_dict twice
        vars(layer)["activation"] = activation if isinstance(activation, str) else act


def swap_back(layer: _BatchNorm, kind: type[nn.Module]) -> None:
    """Convert `layer` to torch's or timm's `kind`: the same object, parameters, buffers and hooks."""
    group = getattr(thawed(layer.statistics), "process_group", None)
    ours, theirs = (vars(each(1, affine=False, track_running_stats=False)) for each in (type(layer), kind))
    for name in (*ours.keys() - theirs.keys(), "activation", "restorable"):
        vars(layer).pop(name, None)
    layer._modules.pop("activation", None)
    narrow(layer)
    if kind is nn.SyncBatchNorm:
        vars(layer)["process_group"] = group
    layer.__class__ = kind


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def is_timm_s(layer: nn.Module) -> bool:
    """Whether `layer` is timm's batch normalization with an activation in it."""
    kind = type(layer)
    return kind.__name__ == "BatchNormAct2d" and kind.__module__.partition(".")[0] == "timm"
