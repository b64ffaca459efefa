"""`model, report = upgrade(model)`: convert torch's layers to ours, and fuse the activations that follow them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TypeVar, cast

from torch import fx, nn

from batchnorm.graph import rewrite
from batchnorm.graph.call_graph import MODES, CallGraph, Tails, Traced
from batchnorm.graph.chain import Chain, Unfusable, activation_module, follow
from batchnorm.graph.modules import Fused, has_hooks, is_normalization, is_ours, stand_in
from batchnorm.graph.trace import Trace, is_plain_identity, is_sequential
from batchnorm.layers import _BatchNorm
from batchnorm.passes.report import LayerReport, Report
from batchnorm.passes.rollback import unchanged_on_failure
from batchnorm.passes.swap import is_timm_s, obstacle, swap

Model = TypeVar("Model", bound=nn.Module)


def upgrade(model: Model, *, fuse: bool = True) -> tuple[Model, Report]:
    """Make every `torch.nn.BatchNorm1d/2d/3d` of `model` ours, in place, and fuse the activations that follow.

    A layer stays the same object with the same parameters, buffers, hooks and flags; only its class changes. The
    state_dict keeps its keys, and outputs, gradients and running statistics are the same to rounding.

    What is fused: BN → activation and BN → (+ residual) → activation, for the activations that a layer has a name for
    and LeakyReLU of any slope. In a Sequential the activation's place is taken by an Identity. Where a module's own
    forward makes the calls, it is traced with torch.fx, in both modes, and the module gets a subclass of its
    class, of the same name, with a forward without them.

    Such a forward holds for calls like those that were seen: attributes that it has read are constants, arguments
    that have a default stay at it, and no child is set to None. The first call for which an argument, a child or a
    plain attribute (int, str, ...) has changed returns the module to its old forward, unfused, for good. What a forward
    does beside computing, as printing, is done no more. A hook that is set later on a fused layer sees the output of
    all that was fused; on a fused activation, nothing.

    Layers of other classes (SyncBatchNorm, subclasses, ...) are left alone. timm's BatchNormAct2d is understood.

    Args:
        model: any module; a layer by itself is one too.
        fuse: False swaps the layers only.

    Returns: `model` itself, and a Report: the outcome for each layer with its reason.

    Raises:
        TypeError: `model` is not a torch.nn.Module.

    Example:
        >>> import torch, batchnorm as bn
        >>> block = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()]
        >>> model, report = bn.upgrade(torch.nn.Sequential(*block))
        >>> report
        1  fused  relu
        1 layer: 1 fused
    """
    if not isinstance(cast(object, model), nn.Module):
        advice = f": pass an instance, {model.__name__}(...)" if isinstance(model, type) else ""
        raise TypeError(f"upgrade takes a torch.nn.Module, not {type(model).__name__}{advice}")
    with unchanged_on_failure(model):
        return model, _upgrade(model, fuse)


def _upgrade(model: nn.Module, fuse: bool) -> Report:
    layers = {each: name for name, each in model.named_modules() if is_normalization(each)}
    obstacles = {layer: why for layer in layers if (why := obstacle(layer)) is not None}
    if not fuse:
        fused = {
            layer: "fuse=False, and it has an activation of its own" for layer in layers if is_timm_s(layer)
        }
        obstacles = fused | obstacles
    for layer in layers:
        if layer not in obstacles:
            swap(layer)
    fusions = _fuse(model, [layer for layer in layers if is_ours(layer)]) if fuse else {}

    def report(layer: nn.Module, name: str) -> LayerReport:
        fusion = fusions.get(layer, Fusion(why="fuse=False"))
        if fusion.what:
            return LayerReport(name, "fused", fusion.what)
        if layer in obstacles:
            return LayerReport(name, "left alone", why=obstacles[layer])
        if is_ours(layer) and layer.activation is not None:  # the one of timm's layer
            if isinstance(layer.activation, str):
                return LayerReport(name, "fused", layer.activation)
            return LayerReport(name, "swapped", why=f"{type(layer.activation).__name__} has no fused kernel")
        return LayerReport(name, "swapped", why=fusion.why)

    return Report(tuple(report(layer, name) for layer, name in layers.items()))


@dataclass(frozen=True)
class Fusion:
    """The outcome for one layer: what was fused into it, or why nothing was."""

    what: str = ""
    why: str = ""


Fusions = dict[nn.Module, Fusion]


def _fuse(model: nn.Module, layers: list[_BatchNorm]) -> Fusions:
    """Fuse the residual and activation after each of `layers`."""
    calls = CallGraph.of(model)
    fusions: Fusions = {}
    by_block: dict[nn.Module, list[_BatchNorm]] = {}
    for layer in layers:
        try:
            owner, follower = _find_follower(layer, calls)
            if follower is None:
                by_block.setdefault(owner, []).append(layer)
            else:
                fusions[layer] = _in_sequential(layer, owner, follower, calls)
        except Unfusable as reason:
            fusions[layer] = Fusion(why=str(reason))
    for owner, members in by_block.items():
        fusions |= _in_block(owner, members, calls)
    return fusions


def _find_follower(layer: _BatchNorm, calls: CallGraph) -> tuple[nn.Module, str | None]:
    """The module whose forward contains the next operation; and, if it is a Sequential, the name of the next module.

    Raises: Unfusable if not all calls of the layer are known.
    """
    if layer.activation is not None:
        raise Unfusable("has an activation already")
    if has_hooks(layer):
        raise Unfusable("has hooks, which would see the fused output")
    child: nn.Module = layer
    while (owner := calls.owner(child)) is not None:
        why = calls.obstacle(child, owner)
        if why is not None:
            raise Unfusable(why)
        if is_sequential(owner):
            follower = _next_module(child, owner)
            if follower is not None:
                return owner, follower
        elif owner not in calls.tails:
            return owner, None
        if has_hooks(owner):
            raise Unfusable(f"no activation follows in its {type(owner).__name__}, which has hooks")
        child = owner
    if child is not layer:
        raise Unfusable("no activation follows")
    holders = [each for each in calls.opaque if any(child is layer for child in each.modules())]
    raise Unfusable(calls.opaque[holders[-1]] if holders else "no call of it was found")


def _next_module(child: nn.Module, owner: nn.Module) -> str | None:
    """The name of the module that follows `child` in a Sequential, or None."""
    children = [(name, each) for name, each in owner._modules.items() if each is not None]
    place = next(index for index, (_, each) in enumerate(children) if each is child)
    return next((name for name, each in children[place + 1 :] if not is_plain_identity(each)), None)


def _in_sequential(layer: _BatchNorm, owner: nn.Module, name: str, calls: CallGraph) -> Fusion:
    """Fuse the activation of that name in a Sequential into `layer`."""
    follower = owner.get_submodule(name)
    activation = activation_module(follower)
    if any(follower in trace.called for traced in calls.traced.values() for trace in traced.by_mode.values()):
        raise Unfusable(f"{type(follower).__name__}, which follows, is called from elsewhere too")
    layer.activation = activation
    owner._modules[name] = stand_in(Fused(follower, layer, activation))
    return Fusion(str(activation))


def _in_block(owner: nn.Module, layers: list[_BatchNorm], calls: CallGraph) -> Fusions:
    """Fuse the residual and activation after `layers` in the forward of `owner`, if they are the same in both modes."""
    traced = calls.traced[owner]
    fusions: Fusions = {}
    fused: dict[str, _BatchNorm] = {}
    for layer in layers:
        try:
            rewrite.check_writable(owner)
            chains = {mode: _chain(layer, traced.by_mode[mode], owner) for mode in MODES}
            found = [chain for chain in chains.values() if chain is not None]
            if any(each.what != found[0].what for each in found):
                raise Unfusable("the next operation differs between training and evaluation")
            for mode, chain in chains.items():
                if chain is not None:
                    path = str(chain.layer.target)
                    _contract(traced.by_mode[mode].graph, chain)
            fused[path] = layer
            layer.activation = found[0].activation
            fusions[layer] = Fusion(found[0].what)
        except (Unfusable, rewrite.Unwritable) as reason:
            fusions[layer] = Fusion(why=str(reason))
    if not fused:
        return fusions
    if rewrite.is_graph(owner):
        owner.graph = traced.by_mode[True].graph  # in evaluation it is the same
        return fusions
    try:
        rewrite.rewrite(owner, _rewriting(owner, traced, calls.tails, tuple(fused)))
    except (TypeError, rewrite.Unwritable) as reason:
        for layer in fused.values():
            layer.activation = None
            fusions[layer] = Fusion(
                why=f"the forward of {type(owner).__name__} cannot be rewritten: {reason}"
            )
    return fusions


def _rewriting(owner: nn.Module, traced: Traced, tails: Tails, fused: tuple[str, ...]) -> rewrite.Rewriting:
    """The rewritten forward of `owner`, with the layers at these paths fused. Raises: Unwritable."""
    training, evaluation = (traced.by_mode[mode] for mode in MODES)
    inlined = {**training.inlined, **evaluation.inlined}
    read = {"": {**training.attributes, **evaluation.attributes}}
    read.update({path: tails[each] for path, each in inlined.items()})
    return rewrite.Rewriting(
        rewrite.Source.of(training.graph),
        rewrite.Source.of(evaluation.graph),
        tuple((name, kind.__name__) for name, kind in traced.inputs.items()),
        tuple((path, name, value) for path, each in read.items() for name, value in sorted(each.items())),
        rewrite.guarded_children(owner, inlined),
        fused,
    )


def _chain(layer: _BatchNorm, trace: Trace, owner: nn.Module) -> Chain | None:
    """The chain after `layer` in `trace`; None if it is not called there."""
    for node in trace.graph.nodes:
        if node.op == "call_module" and owner.get_submodule(str(node.target)) is layer:
            return follow(node, trace, owner)
    return None


def _contract(graph: fx.Graph, chain: Chain) -> None:
    """Replace the nodes of `chain` by one call of the layer."""
    called = chain.layer
    if chain.add is not None:
        with graph.inserting_before(chain.add):
            layer = graph.get_attr(str(chain.layer.target))
            in_place = chain.add.target in (operator.iadd, "add_")
            called = graph.call_function(
                rewrite.add_residual, (layer, chain.layer.args[0], chain.residual, in_place)
            )
    chain.last.replace_all_uses_with(called)
    for node in (chain.last, *reversed(chain.intermediate)):
        graph.erase_node(node)
    if called is not chain.layer:
        graph.erase_node(chain.layer)
