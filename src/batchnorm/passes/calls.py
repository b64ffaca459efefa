"""Who calls whom in a model: a layer may change its meaning only where every call of it is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from inspect import Parameter
from typing import Any

from torch import Tensor, fx, nn

from batchnorm.passes.source import reaches_into
from batchnorm.passes.swap import has_hooks, is_ours, is_patched
from batchnorm.passes.trace import Inputs, Trace, Untraceable, is_passive, is_sequential, parameters, trace

MODES = (True, False)


class Calls:
    """The calls in `model` that can reach a layer of ours.

    Attributes:
        traces: the forward of each module that was traced, by mode of training.
        opaque: why, for each module that could not be.
        inputs: what each traced module was traced with.
        tails: the modules whose output is that of a layer, so that what follows may be fused, each with the plain
            attributes that its forward reads.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.traces: dict[nn.Module, dict[bool, Trace]] = {}
        self.opaque: dict[nn.Module, str] = {}
        self.inputs: dict[nn.Module, Inputs] = {}
        self.tails: dict[nn.Module, dict[str, Any]] = {}
        for module in reversed(list(model.modules())):
            attributes = self._tail(module)
            if attributes is not None:
                self.tails[module] = attributes
        for module in model.modules():  # a caller mostly comes before what it calls, and knows its inputs
            if is_ours(module) or is_sequential(module) or not any(map(is_ours, module.modules())):
                continue
            if type(module).forward is not nn.Module.forward:  # a ModuleList has none
                self._trace(module)
        self.callers: dict[nn.Module, Counter[nn.Module]] = {}
        self._follow(model, set())

    def obstacle(self, layer: nn.Module, owner: nn.Module) -> str | None:
        """Why calls of `layer` other than the one in `owner` may exist, or None."""
        number = sum(self.callers.get(layer, Counter()).values())
        if number > 1:
            return f"is called from {number} places"
        for module, why in self.opaque.items():
            holds = module is not owner and any(each is layer for each in module.modules())
            if holds and reaches_into(module, layer):
                return f"{type(module).__name__} may call it in a way of its own: {why}"
        return None

    def owner(self, layer: nn.Module) -> nn.Module | None:
        """The module whose forward calls `layer`, if one is known to."""
        return next(iter(self.callers.get(layer, ())), None)

    def _tail(self, module: nn.Module) -> dict[str, Any] | None:
        """The attributes that `module` reads, if its output is that of a layer."""
        if has_hooks(module) or is_ours(module) or not any(map(is_ours, module.modules())):
            return None
        if is_sequential(module):
            last = next((each for each in reversed(list(module.children())) if not is_passive(each)), None)
            return {} if last is not None and self._gives_a_layer_s(last) else None
        known = parameters(module)
        if is_patched(module) or known is None or type(module).forward is nn.Module.forward:
            return None
        try:
            training, evaluation = (trace(module, _required(known), mode) for mode in MODES)
        except Untraceable:
            return None
        # its calls may stand in its caller's forward if they are the same in both modes; with more to fuse than its
        # last layer it is better rewritten itself, which serves all its callers
        if str(training.graph) != str(evaluation.graph) or training.methods:
            return None
        last, *others = [each for each in reversed(training.whole) if not is_passive(each)] or [module]
        if not self._gives_a_layer_s(last):
            return None
        if any(is_ours(each) or each in self.tails for each in others):
            return None
        return training.attributes if _output(training.graph, module) is last else None

    def _gives_a_layer_s(self, module: nn.Module) -> bool:
        return module in self.tails or (
            is_ours(module) and module.activation is None and not has_hooks(module)
        )

    def _trace(self, module: nn.Module) -> None:
        try:
            if is_patched(module):
                raise Untraceable("it was replaced on the instance")
            inputs = self._inputs_of(module)
            self.traces[module] = {mode: trace(module, inputs, mode, self.tails) for mode in MODES}
            self.inputs[module] = inputs
        except Untraceable as obstacle:
            self.opaque[module] = f"the forward of {type(module).__name__} cannot be traced: {obstacle}"

    def _inputs_of(self, module: nn.Module) -> Inputs:
        """The arguments that the callers give `module`, if they agree; else those that it must be given."""
        known = parameters(module)
        if known is None:
            raise Untraceable("it takes *args or **kwargs")
        required = _required(known)
        given = [_given(node, known) for node in self._nodes_calling(module)]
        if not given or any(each != given[0] for each in given) or not required.keys() <= given[0].keys():
            return required
        return given[0]

    def _nodes_calling(self, module: nn.Module) -> Iterable[fx.Node]:
        for caller, traces in self.traces.items():
            for each in traces.values():
                for node in each.graph.nodes:
                    if node.op == "call_module" and caller.get_submodule(str(node.target)) is module:
                        yield node

    def _follow(self, module: nn.Module, seen: set[nn.Module]) -> None:
        """Count the calls by `module`, which runs, and by what it calls."""
        if module in seen:
            return
        seen.add(module)
        called: Counter[nn.Module]
        if is_sequential(module):
            called = Counter(child for child in module._modules.values() if child is not None)
        elif module in self.traces:
            called = Counter()
            for each in self.traces[module].values():
                called |= Counter(each.whole)
        else:  # what is below it may run
            if module in self.opaque or module is self.model:
                for child in module.modules():
                    self._follow(child, seen)
            return
        for child, number in called.items():
            self.callers.setdefault(child, Counter())[module] += number
            self._follow(child, seen)


def _output(graph: fx.Graph, module: nn.Module) -> nn.Module | None:
    """The child whose output is that of `graph`, and nothing else's."""
    (value,) = next(iter(reversed(graph.nodes))).args
    while isinstance(value, fx.Node) and value.op == "call_module" and len(value.users) == 1:
        child = module.get_submodule(str(value.target))
        if not is_passive(child):
            return child
        value = value.args[0]
    return None


def _required(known: dict[str, Parameter]) -> Inputs:
    return {name: Tensor for name, each in known.items() if each.default is each.empty}


def _given(node: fx.Node, known: dict[str, Parameter]) -> dict[str, type]:
    values = {**dict(zip(known, node.args, strict=False)), **node.kwargs}
    return {
        name: list if isinstance(value, list | tuple) else Tensor
        for name, value in values.items()
        if name not in known or known[name].default is not value
    }
