"""`model, report = strip_bias(model, *inputs)`: a bias before batch normalization is subtracted again with the mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from batchnorm.graph.modules import has_hooks, is_ours, is_patched, layers_of
from batchnorm.graph.observation import ModuleCall, Operation, Value, observe
from batchnorm.graph.sources import NotLinear
from batchnorm.graph.trace import Untraceable, is_plain_identity
from batchnorm.graph.whole_trace import whole_trace
from batchnorm.passes.fold.normalization import TORCH_S, Left
from batchnorm.passes.fold.plan import Tensors, own_origin
from batchnorm.passes.fold.proof import copy_of, detached
from batchnorm.passes.report import LayerReport, Report

Model = TypeVar("Model", bound=nn.Module)
Biases = dict[
    str, tuple[Tensor, Tensor]
]  # by path: the channel to which each element comes, and its factor there


class Kept(Exception):
    """The biases before a layer cannot go; the message says why."""


def strip_bias(model: Model, *inputs: Any, **keywords: Any) -> tuple[Model, Report]:
    """Remove the biases that batch normalization makes useless, in place; the model computes the same.

        BN(W·x + b) is BN(W·x): the mean of the batch has b in it (Ioffe & Szegedy 2015, section 3.2)

    The running mean is moved by the bias, so that evaluation stays the same too, in the running statistics of every
    domain. The model has fewer parameters; an optimizer that was made before keeps the removed ones, without effect.

    Which layer is behind which is seen in a run with example inputs, in either mode, on a copy: through layout changes,
    concatenation and sums. Without inputs the forward is traced instead, which shows layers that are called right after
    a convolution.

    Args:
        model: any module.
        inputs: of its forward, for example: a batch to train on.
        keywords: further inputs, by name.

    Returns: `model` itself, and a Report: "stripped" with the operations whose bias went, or "left alone" and why.

    Raises:
        ValueError: without inputs, a model that cannot be traced: the message says what to pass.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> model, report = bn.strip_bias(model)
        >>> report
        1  stripped  0
        1 layer: 1 stripped
        >>> model[0].bias is None
        True
    """
    layers = layers_of(model)
    found, why = _in_both_modes(model, inputs, keywords) if inputs or keywords else _traced(model)
    stripped: dict[str, Biases] = {}
    for path, biases in found.items():
        try:
            _check_layer(layers[path])
            for home in biases:
                _check_home(model, home)
        except Kept as reason:
            why[path] = str(reason)
        else:
            stripped[path] = biases
    moved = [pair for path, biases in stripped.items() for pair in _moved(model, layers[path], biases)]
    with torch.no_grad():
        for mean, new in moved:
            mean.copy_(new)
    for biases in stripped.values():
        for home in biases:
            model.get_submodule(home).register_parameter("bias", None)
    return model, Report(
        tuple(
            LayerReport(path, "stripped", ", ".join(stripped[path]))
            if path in stripped
            else LayerReport(path, "left alone", why=why.get(path, "was not called"))
            for path in layers
        )
    )


def _in_both_modes(
    model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[dict[str, Biases], dict[str, str]]:
    """The biases before each layer, if they are the same in training and evaluation; and why there are none."""
    given, named = detached((inputs, keywords))
    found, why = _observed(copy_of(model).train(), given, named)
    in_evaluation, why_not = _observed(copy_of(model).eval(), given, named)
    for path in list(found):
        other = in_evaluation.get(path)
        if other is None or not _same(found[path], other):
            del found[path]
            why[path] = why_not.get(path, "what is before it differs between training and evaluation")
    return found, why


def _observed(
    running: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[dict[str, Biases], dict[str, str]]:
    """The biases before each layer, and why there are none, by what happens in one run."""
    seen = observe(running, *inputs, **keywords)
    tensors = Tensors(running, seen)
    found: dict[str, Biases] = {}
    why: dict[str, str] = {}
    for path, layer in layers_of(running).items():
        calls = seen.calls_of(layer)
        if not calls:
            continue
        try:
            tensors.check_replaced(layer, calls)
            each = [biases_before(call, tensors) for call in calls]
            biases, *others = ({home: places for home, (places, _, _) in one.items()} for one in each)
            readers = {operation for one in each for _, _, operation in one.values()}
            for bias in {bias for one in each for _, bias, _ in one.values()}:
                if not readers.issuperset(bias.users):
                    raise Kept(f"{bias.name} is read by others too")
            if any(not _same(other, biases) for other in others):
                raise Kept("is called several times, after different operations")
            found[path] = biases
        except (Kept, Left, NotLinear) as reason:
            why[path] = str(reason)
    seen.forget()
    return found, why


_Found = dict[str, tuple[tuple[Tensor, Tensor], Value, Operation]]


def biases_before(call: ModuleCall, tensors: Tensors) -> _Found:
    """The biases before a call of a layer: by the path of their module, where they come to, and what adds which.

    Raises: Kept if there is none, or one may be needed.
    """
    value = (call.given or call.reads)[0]
    found: _Found = {}
    for source in own_origin(call, value, tensors).sources:
        bias = source.linear.bias
        if bias is not None:
            if bool((source.channels < 0).any()):
                raise Kept(f"not all outputs of {bias.name.rpartition('.')[0]} come to it")
            found[bias.name.rpartition(".")[0]] = (
                (source.channels, source.factors),
                bias,
                source.linear.operation,
            )
    if not found:
        raise Kept("there is no bias before it")
    return found


def _same(one: Biases, other: Biases) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True)
    )


def _traced(model: nn.Module) -> tuple[dict[str, Biases], dict[str, str]]:
    """The bias before each layer, as far as a graph of the calls shows it."""
    try:
        graph = whole_trace(model, True, layers_are_leaves=True).graph
    except Untraceable as reason:
        raise ValueError(
            f"without example inputs the model is traced, and {reason}: pass inputs, strip_bias(model, images)"
        ) from None
    nodes: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            nodes.setdefault(model.get_submodule(str(node.target)), []).append(node)
    found: dict[str, Biases] = {}
    why: dict[str, str] = {}
    for path, layer in layers_of(model).items():
        homes = []
        for node in nodes.get(layer, []):
            before: Any = (*node.args, *node.kwargs.values())[0]
            while _calls_identity(model, before):
                before = before.args[0]
            if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
                why[path] = "what is before it is no linear operation, or is read elsewhere too"
                break
            homes.append(str(before.target))
        if path in why or not homes:
            continue
        if len(set(homes)) > 1 or len(nodes[model.get_submodule(homes[0])]) != len(homes):
            why[path] = "is called several times, after different operations"
            continue
        home = model.get_submodule(homes[0])
        bias = getattr(home, "bias", None)
        if isinstance(home, nn.Linear):
            why[path] = (
                "which dimension its channels are, shows in a run alone: pass inputs, strip_bias(model, batch)"
            )
        elif isinstance(bias, Tensor) and len(bias) != layer.num_features:
            why[path] = f"has {layer.num_features} channels, and {homes[0]} makes {len(bias)}"
        elif isinstance(bias, Tensor):
            found[path] = {homes[0]: (torch.arange(len(bias)), torch.ones(len(bias), dtype=torch.float64))}
        else:
            why[path] = "there is no bias before it"
    return found, why


def _calls_identity(model: nn.Module, node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and len(node.users) == 1
        and is_plain_identity(model.get_submodule(str(node.target)))
    )


def _check_layer(layer: nn.Module) -> None:
    if not (type(layer).forward in TORCH_S or is_ours(layer)) or is_patched(layer):
        raise Kept(f"is {type(layer).__name__}, which has a forward of its own")
    if has_hooks(layer):
        raise Kept("has hooks, which see its input")
    if getattr(layer, "debiased", False):
        raise Kept("is debiased: its running mean is not only a mean")
    if is_ours(layer) and layer.running_mean is not None and layer.running_mean.dim() != 1:
        raise Kept("has statistics of each activation")


def _check_home(model: nn.Module, path: str) -> None:
    module = model.get_submodule(path)
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    if not isinstance(module, kinds) or is_patched(module) or parametrize.is_parametrized(module):
        raise Kept(f"{path}, a {type(module).__name__}, may need its bias")
    if has_hooks(module):
        raise Kept(f"{path} has hooks, which see its output")
    bias = module._parameters.get("bias")
    holders = [each for each in model.modules() if any(own is bias for own in each._parameters.values())]
    if bias is None or len(holders) > 1:
        raise Kept(f"the bias of {path} is a parameter of other modules too")


def _moved(model: nn.Module, layer: nn.Module, biases: Biases) -> Iterator[tuple[Tensor, Tensor]]:
    """The running means of a layer, and what they are without the biases."""
    holders: Sequence[Any] = [layer]
    if is_ours(layer):
        holders = [layer, *(layer._domains().values())]
    for holder in holders:
        mean = holder.running_mean
        if mean is None:
            continue
        new = mean.double()
        for home, (channels, factors) in biases.items():
            bias = cast(Tensor, model.get_submodule(home).bias).detach().double() * factors.to(mean.device)
            reached = (channels >= 0).to(mean.device)
            new = new.index_add(0, channels.to(mean.device)[reached], -bias[reached])
        yield mean, new
