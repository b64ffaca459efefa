"""The call graph of a model. A layer may be fused only if all of its calls are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from torch import Tensor, fx, nn

from batchnorm.graph.forward_text import reaches_into
from batchnorm.graph.modules import has_hooks, is_ours, is_patched
from batchnorm.graph.trace import (
    Inputs,
    Trace,
    Untraceable,
    is_plain_identity,
    is_sequential,
    parameters,
    trace,
)

MODES = (True, False)

Tails = dict[
    nn.Module, dict[str, Any]
]  # modules that return the output of a layer, and the attributes that they read


@dataclass(frozen=True)
class Traced:
    """The traces of a module's forward, by training mode, and the types of its inputs."""

    by_mode: Mapping[bool, Trace]
    inputs: Inputs


@dataclass(frozen=True)
class CallGraph:
    """The calls in a model that can reach a layer of ours.

    traced: the traces of each module whose forward was traced.
    opaque: the reason for each module that could not be traced.
    tails: the modules that return the output of a layer, so that an activation after them can be fused; each with the
        plain attributes that its forward reads.
    callers: for each called module, the number of calls by each caller.
    """

    traced: Mapping[nn.Module, Traced]
    opaque: Mapping[nn.Module, str]
    tails: Tails
    callers: Mapping[nn.Module, Counter[nn.Module]]

    @classmethod
    def of(cls, model: nn.Module) -> CallGraph:
        """The call graph of `model`, by tracing its forwards; nothing is computed, and the model is not changed."""
        tails = _tails(model)
        traced: dict[nn.Module, Traced] = {}
        opaque: dict[nn.Module, str] = {}
        # callers usually come before the modules that they call, whose inputs they determine
        for module in model.modules():
            if is_ours(module) or is_sequential(module) or not any(map(is_ours, module.modules())):
                continue
            if type(module).forward is nn.Module.forward:  # a ModuleList has none
                continue
            try:
                traced[module] = _trace_module(module, traced, tails)
            except Untraceable as reason:
                opaque[module] = f"the forward of {type(module).__name__} cannot be traced: {reason}"
        return cls(traced, opaque, tails, _callers(model, traced, opaque))

    def obstacle(self, layer: nn.Module, owner: nn.Module) -> str | None:
        """Why there may be calls of `layer` other than the one in `owner`, or None."""
        number = sum(self.callers.get(layer, Counter()).values())
        if number > 1:
            return f"is called from {number} places"
        for module, why in self.opaque.items():
            holds = module is not owner and any(each is layer for each in module.modules())
            if holds and reaches_into(module, layer):
                return f"{type(module).__name__} may call it too: {why}"
        return None

    def owner(self, layer: nn.Module) -> nn.Module | None:
        """The module whose forward calls `layer`, or None if no call is known."""
        return next(iter(self.callers.get(layer, ())), None)


def _tails(model: nn.Module) -> Tails:
    """The tails of `model`, computed for children before their parents."""
    tails: Tails = {}
    for module in reversed(list(model.modules())):
        attributes = _attributes_of_tail(module, tails)
        if attributes is not None:
            tails[module] = attributes
    return tails


def _attributes_of_tail(module: nn.Module, tails: Tails) -> dict[str, Any] | None:
    """The attributes that `module` reads, if it is a tail."""
    if has_hooks(module) or is_ours(module) or not any(map(is_ours, module.modules())):
        return None
    if is_sequential(module):
        last = next((each for each in reversed(list(module.children())) if not is_plain_identity(each)), None)
        return {} if last is not None and _ends_in_layer(last, tails) else None
    parameters_by_name = parameters(module)
    if is_patched(module) or parameters_by_name is None or type(module).forward is nn.Module.forward:
        return None
    try:
        training, evaluation = (trace(module, _required_inputs(parameters_by_name), mode) for mode in MODES)
    except Untraceable:
        return None
    # it can be inlined in its caller's forward if it is the same in both modes; if it has more layers to fuse, it is
    # rewritten itself instead, for all its callers
    if str(training.graph) != str(evaluation.graph) or training.methods:
        return None
    last, *others = [each for each in reversed(training.called) if not is_plain_identity(each)] or [module]
    if not _ends_in_layer(last, tails):
        return None
    if any(is_ours(each) or each in tails for each in others):
        return None
    return training.attributes if _output(training.graph, module) is last else None


def _ends_in_layer(module: nn.Module, tails: Tails) -> bool:
    """Whether the output of `module` is that of a layer without an activation."""
    return module in tails or (is_ours(module) and module.activation is None and not has_hooks(module))


def _trace_module(module: nn.Module, callers: Mapping[nn.Module, Traced], tails: Tails) -> Traced:
    """The forward of `module` in both modes. Raises: Untraceable."""
    if is_patched(module):
        raise Untraceable("it was replaced on the instance")
    inputs = _inputs_of(module, callers)
    return Traced({mode: trace(module, inputs, mode, tails) for mode in MODES}, inputs)


def _inputs_of(module: nn.Module, callers: Mapping[nn.Module, Traced]) -> Inputs:
    """The arguments that the callers of `module` pass, if they all agree; else its required arguments."""
    parameters_by_name = parameters(module)
    if parameters_by_name is None:
        raise Untraceable("it takes *args or **kwargs")
    required = _required_inputs(parameters_by_name)
    given = [_passed_arguments(node, parameters_by_name) for node in _nodes_calling(module, callers)]
    if not given or any(each != given[0] for each in given) or not required.keys() <= given[0].keys():
        return required
    return given[0]


def _nodes_calling(module: nn.Module, callers: Mapping[nn.Module, Traced]) -> Iterable[fx.Node]:
    for caller, traced in callers.items():
        for each in traced.by_mode.values():
            for node in each.graph.nodes:
                if node.op == "call_module" and caller.get_submodule(str(node.target)) is module:
                    yield node


def _callers(
    model: nn.Module, traced: Mapping[nn.Module, Traced], opaque: Mapping[nn.Module, str]
) -> dict[nn.Module, Counter[nn.Module]]:
    """For each module that is called when `model` runs, the number of calls by each caller."""
    callers: dict[nn.Module, Counter[nn.Module]] = {}
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        if is_sequential(module):
            called = Counter(child for child in module._modules.values() if child is not None)
        elif module in traced:
            called = Counter()
            for each in traced[module].by_mode.values():
                called |= Counter(each.called)
        else:  # any module below it may be called
            if module in opaque or module is model:
                for child in module.modules():
                    visit(child)
            return
        for child, number in called.items():
            callers.setdefault(child, Counter())[module] += number
            visit(child)

    visit(model)
    return callers


def _output(graph: fx.Graph, module: nn.Module) -> nn.Module | None:
    """The child whose output is returned by `graph` and not used otherwise, or None."""
    (value,) = next(iter(reversed(graph.nodes))).args
    while isinstance(value, fx.Node) and value.op == "call_module" and len(value.users) == 1:
        child = module.get_submodule(str(value.target))
        if not is_plain_identity(child):
            return child
        value = value.args[0]
    return None


def _required_inputs(parameters_by_name: dict[str, Parameter]) -> Inputs:
    return {name: Tensor for name, each in parameters_by_name.items() if each.default is each.empty}


def _passed_arguments(node: fx.Node, parameters_by_name: dict[str, Parameter]) -> dict[str, type]:
    values = {**dict(zip(parameters_by_name, node.args, strict=False)), **node.kwargs}
    return {
        name: list if isinstance(value, list | tuple) else Tensor
        for name, value in values.items()
        if name not in parameters_by_name or parameters_by_name[name].default is not value
    }
