"""`model, report = downgrade(model)`: torch's own layers again, for tools that know no others."""

from __future__ import annotations

import importlib
from typing import TypeVar, cast

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm import layers
from batchnorm.graph import rewrite
from batchnorm.graph.modules import activation_of, fused_at, is_normalization, module_of
from batchnorm.graph.trace import is_sequential
from batchnorm.layers import OURS, _BatchNorm
from batchnorm.passes.report import LayerReport, Report
from batchnorm.passes.rollback import unchanged_on_failure
from batchnorm.passes.save_memory import keep_outputs
from batchnorm.passes.swap import swap_back
from batchnorm.statistics.population import Population, thawed
from batchnorm.statistics.sync import Sync

M = TypeVar("M", bound=nn.Module)

_THEIRS: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in OURS.items()}


def downgrade(model: M, *, sync: bool = True) -> tuple[M, Report]:
    """Make every layer of ours in `model` torch's again, in place: the way back from `upgrade`.

    A layer stays the same object with the same parameters, buffers, hooks and flags; only its class changes, and what
    it did after the normalization is done by modules of their own again. A forward that `upgrade` rewrote is the
    model's own; the Identity in a Sequential is the activation that it replaced, the same object. So `downgrade` after
    `upgrade` gives back the model that was upgraded, to the keys of its state_dict and what its pickle names.

    It is what to call before a tool that knows torch's classes alone: torch.fx's `fuse`, eager and FX quantization,
    `convert_sync_batchnorm`; docs/interoperability.md lists them.

    An activation that the constructor was given gets a module of its own: after the layer in its Sequential, under the
    name of the layer with "_activation" behind it, so that no key of the state_dict changes.

    A frozen layer (`freeze`, `Population`) has no counterpart that outlasts `.train()`: it is put in evaluation mode,
    where it normalises by its running statistics, until the next `.train()`.

    Args:
        model: any module; a layer by itself is one too.
        sync: what a layer with `Sync` becomes: torch.nn.SyncBatchNorm, or False: the layer of its rank, by itself.

    Returns: `model` itself, and a Report that lists the layers, "downgraded" with the class that each became.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: names each layer that has no counterpart among torch's, and why: `Ghost`, `Renorm`, domains, every
            activation by itself, `debiased`, `on_single`, a subclass of ours, an activation for which there is no
            place; then nothing has been changed.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> model, _ = bn.upgrade(model)
        >>> model, report = bn.downgrade(model)
        >>> report
        1  downgraded  BatchNorm2d, relu
        1 layer: 1 downgraded
        >>> type(model[1]), model[2]
        (<class 'torch.nn.modules.batchnorm.BatchNorm2d'>, ReLU())
    """
    if not isinstance(cast(object, model), nn.Module):
        raise TypeError(f"downgrade takes a torch.nn.Module, not {type(model).__name__}")
    found = {each: name for name, each in model.named_modules() if is_normalization(each)}
    ours = {each: name for each, name in found.items() if isinstance(each, _BatchNorm)}
    activations = {layer: layer.activation for layer in ours}
    with unchanged_on_failure(model):
        kinds, reasons = {}, _restore_forwards(model)
        _restore_activations(model)
        for layer, name in ours.items():
            try:
                kinds[layer] = _counterpart(layer, sync)
                _split_activation(model, layer)
            except (_NoCounterpart, rewrite.Unwritable) as reason:
                reasons.append(f"{name or 'the model itself'} {reason}")
        if reasons:
            raise ValueError("these layers cannot become torch's: " + "; ".join(reasons))
        frozen = {layer for layer in ours if isinstance(layer.statistics, Population)}
        keep_outputs(model)
        for layer, kind in kinds.items():
            swap_back(layer, kind)
            if layer in frozen:
                layer.training = False

    def report(layer: nn.Module, name: str) -> LayerReport:
        if layer not in ours:
            kind = type(layer)
            return LayerReport(name, "left alone", why=f"is {kind.__name__} of {kind.__module__}")
        activation = activations[layer]
        what = kinds[layer].__name__ + ("" if activation is None else f", {activation}")
        why = "in evaluation mode, until the next .train()" if layer in frozen else ""
        return LayerReport(name, "downgraded", what, why)

    return model, Report(tuple(report(layer, name) for layer, name in found.items()))


class _NoCounterpart(Exception):
    """A layer cannot become torch's; the message says why."""


def _counterpart(layer: _BatchNorm, sync: bool) -> type[nn.Module]:
    """The class of torch's, or timm's, that `layer` becomes. Raises: _NoCounterpart."""
    kind, statistics = type(layer), thawed(layer.statistics)
    if isinstance(layer, LazyModuleMixin):
        raise _NoCounterpart("is lazy: run a batch through the model first")
    if kind not in _THEIRS and kind is not layers.BatchNorm:
        raise _NoCounterpart(f"is {kind.__name__} of {kind.__module__}, not exactly a layer of ours")
    if isinstance(layer.num_features, tuple):
        raise _NoCounterpart(f"has statistics for every activation, num_features={layer.num_features}")
    if not isinstance(statistics, Sync | None):
        raise _NoCounterpart(f"has statistics={statistics!r}: set layer.statistics = None to give them up")
    if domains := layer.domain_names():
        raise _NoCounterpart(f"has running statistics of domains: {', '.join(domains)}")
    if layer.debiased:
        raise _NoCounterpart("is debiased: set layer.debiased = False to give it up")
    if layer.on_single != "raise":
        raise _NoCounterpart(
            f'has on_single="{layer.on_single}": set layer.on_single = "raise" to give it up'
        )
    if statistics is not None and sync:
        return nn.SyncBatchNorm
    if kind is layers.BatchNorm:
        raise _NoCounterpart("takes inputs of any rank: use BatchNorm1d, 2d or 3d")
    if {"drop", "act"} <= layer._modules.keys():
        return _timm_s(layer)
    return _THEIRS[kind]


def _timm_s(layer: _BatchNorm) -> type[nn.Module]:
    try:
        kind: type[nn.Module] = importlib.import_module("timm.layers").BatchNormAct2d
    except ImportError:
        raise _NoCounterpart("was timm's BatchNormAct2d, and timm is not installed") from None
    if issubclass(kind, _BatchNorm):
        raise _NoCounterpart(
            "is derived from ours: timm was imported while torch.nn.BatchNorm2d was bn.BatchNorm2d"
        )
    return kind


def _restore_forwards(model: nn.Module) -> list[str]:
    """Give the modules whose forward was rewritten their own back; return why that cannot be done."""
    reasons = []
    for name, module in list(model.named_modules()):
        if rewrite.is_rewritten(module):
            try:
                rewrite.restore(module)
            except rewrite.Unwritable as reason:
                reasons.append(f"{name or 'the model itself'} {reason}")
    return reasons


def _restore_activations(model: nn.Module) -> None:
    """Put the activations that were fused back to their places."""
    places = [
        (owner, name, fused)
        for owner in model.modules()
        for name, child in owner._modules.items()
        if child is not None and (fused := fused_at(child)) is not None
    ]
    holding = [place for place in places if place[2].layer.activation == place[2].activation]
    for owner, name, fused in holding:
        stood_in = owner._modules[name]
        assert stood_in is not None
        owner._modules[name] = fused.module.train(stood_in.training)
        fused.layer.activation = None


def _split_activation(model: nn.Module, layer: _BatchNorm) -> None:
    """Let a module or a node of its own do what `layer` does after the normalization, if there is anything left.

    Raises: _NoCounterpart, Unwritable.
    """
    if "act" in layer._modules:  # timm's, which has it
        act = layer._modules["act"]
        if layer.activation not in (act, activation_of(cast(nn.Module, act))):
            raise _NoCounterpart(f"has activation={layer.activation!r}, but its act is {act}")
        layer.activation = None
    if layer.activation is None:
        return
    graphs = [each for each in model.modules() if rewrite.is_graph(each)]
    if any([rewrite.split_calls(graph, layer) for graph in graphs]):
        layer.activation = None
        return
    module, described = module_of(layer.activation), f"has activation={layer.activation!r}"
    owners = [each for each in model.modules() if layer in each._modules.values()]
    others = [type(each).__name__ for each in owners if not is_sequential(each)]
    if module is None or others or not owners:
        where = f", and {others[0]} calls it" if others else ", and nothing calls it" if not owners else ""
        raise _NoCounterpart(
            f"{described}{where}: set layer.activation = None and apply it where the layer is called"
        )
    for owner in owners:
        children = list(owner._modules.items())
        owner._modules.clear()
        for name, child in children:
            owner._modules[name] = child
            if child is layer:
                owner._modules[f"{name}_activation"] = module.train(layer.training)
    layer.activation = None
