"""Trace the forward of one module to an fx graph, with its children as leaves; or say why it cannot be traced."""

from __future__ import annotations

import copy
import inspect
import operator
import random
import sys
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.graph.modules import has_hooks, is_patched

Inputs = Mapping[str, type]  # the type, Tensor or list, of each argument that a forward is traced with
PLAIN = (bool, int, float, str, type(None))  # types of attributes that can be compared and pickled


class Untraceable(Exception):
    """The forward does something that a graph cannot represent; the message says what."""


@dataclass
class Trace:
    """The trace of a forward in one mode, training or evaluation."""

    graph: fx.Graph
    called: list[nn.Module]  # the modules that were called, including inlined ones
    inlined: dict[str, nn.Module]  # modules whose own forward was traced too, by path
    attributes: dict[str, Any]  # plain attributes that were read: constants of the graph
    methods: dict[fx.Node, str] = field(
        default_factory=dict
    )  # nodes created in a public method that forward calls, and its name


def is_sequential(module: nn.Module) -> bool:
    """Whether calling `module` calls its children in order and does nothing else."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and not is_patched(module)
        and not isinstance(module, torch.jit.ScriptModule)
    )


def is_plain_identity(module: nn.Module) -> bool:
    """Whether `module` is an nn.Identity without hooks."""
    return type(module) is nn.Identity and not has_hooks(module) and not is_patched(module)


def parameters(module: nn.Module) -> dict[str, inspect.Parameter] | None:
    """The parameters of a forward without self; None if it takes *args, **kwargs or positional-only parameters."""
    try:
        _, *found = inspect.signature(type(module).forward).parameters.values()
    except (TypeError, ValueError):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {each.name: each for each in found} if all(each.kind in named for each in found) else None


def trace(module: nn.Module, inputs: Inputs, training: bool, transparent: Container[nn.Module] = ()) -> Trace:
    """Trace `module.forward` with `inputs`, the other arguments at their defaults, in training or evaluation mode.

    Nothing is computed, and the module is not changed. Children are leaves, except those in `transparent`.

    Raises: Untraceable.
    """
    tracer = _Tracer(inputs, transparent)
    with ExitStack() as stack:
        stack.enter_context(_undo_changes(module))
        stack.enter_context(_set_training(module, training))
        reads = stack.enter_context(_record_reads(module))
        stack.enter_context(torch.enable_grad())  # to detect a forward that disables gradients
        stack.enter_context(_RefuseComputation())  # type: ignore[no-untyped-call]
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(mock.patch.object(torch.autocast, "__enter__", _refuse_autocast))
        try:
            graph = tracer.trace(module)
        except Untraceable:
            raise
        except fx.proxy.TraceError as error:
            raise Untraceable(f"what it does depends on values ({_first_line(error)})") from None
        except NameError as error:
            raise Untraceable(f"it calls a module that is not its child ({_first_line(error)})") from None
        except Exception as error:
            raise Untraceable(f"{type(error).__name__}: {_first_line(error)}") from None
    own = vars(module)
    attributes = {name: own[name] for name in reads if name in own and isinstance(own[name], PLAIN)}
    attributes.pop("training", None)
    _chain_in_place(graph)
    return Trace(graph, tracer.called, tracer.inlined, attributes, tracer.methods)


def is_in_place(node: fx.Node) -> bool:
    """Whether `node` modifies its first argument, judged by its name."""
    if node.kwargs.get("inplace") is True or "out" in node.kwargs:
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        name = str(getattr(node.target, "__name__", ""))
        return name.endswith("_") or node.target in (*_AUGMENTED.values(), operator.setitem)
    return False


_AUGMENTED = {
    name: getattr(operator, name)
    for name in (
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul",
        "iand", "ior", "ixor", "ilshift", "irshift",
    )
}  # fmt: skip


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # buffers are read when the forward runs, not while tracing

    def __init__(self, inputs: Inputs, transparent: Container[nn.Module]) -> None:
        super().__init__()
        self.inputs = inputs
        self.transparent = transparent
        self.depth = 0  # of nested inlined modules
        self.called: list[nn.Module] = []
        self.inlined: dict[str, nn.Module] = {}
        self.methods: dict[fx.Node, str] = {}

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        names = list(self.inputs)

        def _call(root: nn.Module, *values: Any) -> Any:
            return root_fn(root, **dict(zip(names, values, strict=True)))

        _call.__annotations__ = {}  # fx would write them into the graph's code
        return _call, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.transparent

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        if not self.depth:
            self.called.append(m)
        if m not in self.transparent:
            return super().call_module(m, forward, args, kwargs)
        self.inlined[path] = m
        self.depth += 1
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.depth -= 1

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            raise Untraceable("it disables gradients, or defines its own gradient")
        node = super().create_node(kind, *args, **kwargs)
        method = self._method()
        if method:
            self.methods[node] = method
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def _method(self) -> str | None:
        """The public method of the module, other than forward, on the call stack; or None."""
        frame: FrameType | None = sys._getframe(2)
        found = None
        while frame is not None and frame.f_code is not fx.Tracer.trace.__code__:
            name, home = frame.f_code.co_name, str(frame.f_globals.get("__name__"))
            if home == "torch.utils.checkpoint":
                raise Untraceable("it uses activation checkpointing")
            public = name != "forward" and not name.startswith("_") and not hasattr(nn.Module, name)
            if public and callable(getattr(type(self.root), name, None)):
                arguments = frame.f_code.co_varnames[:1]
                if arguments and frame.f_locals.get(arguments[0]) is self.root:
                    found = name
            frame = frame.f_back
        return found


class _Value(fx.Proxy):
    """A proxy whose __class__ is, for an input, the type that the trace assumes; for other values it raises."""

    @property  # type: ignore[misc]  # read-only here
    def __class__(self) -> type:
        caller = sys._getframe(1)
        home = str(caller.f_globals.get("__name__"))
        if home.partition(".")[0] in ("torch", "batchnorm") and caller.f_code.co_name != "is_tensor":
            return _Value
        node = object.__getattribute__(self, "node")
        if node.op != "placeholder":
            raise Untraceable("it depends on the type of a value")
        inputs: Inputs = object.__getattribute__(self, "tracer").inputs
        return inputs[node.target]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise Untraceable(f"it sets {name} of a value")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):  # so that hasattr(x, name) is False as it is for a tensor
            raise AttributeError(f"a tensor has no attribute {name}")
        return super().__getattr__(name)


def _augmented(operation: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


# fx.Proxy lacks them: x += y would be traced as x = x + y, which does not modify the tensor
for _name, _operation in _AUGMENTED.items():
    setattr(_Value, f"__{_name}__", _augmented(_operation))


class _RefuseComputation(TorchDispatchMode):
    """Raises for any computation while tracing, whose result would become a constant of the graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable(f"it computes {func.overloadpacket.__name__} on something that is not its input")


def _refuse_autocast(*_: Any) -> None:
    raise Untraceable("it uses autocast")


@contextmanager
def _undo_changes(module: nn.Module) -> Iterator[None]:
    """Undo, and raise for, changes that a forward makes to the module, and random numbers that it draws."""
    before = [(each, dict(vars(each)), _containers(each)) for each in module.modules()]
    python, numpy = random.getstate(), _numpy_state()
    try:
        yield
    finally:
        changed = []
        for each, attributes, containers in before:
            now = vars(each)
            changed += [
                name for name in {*now, *attributes} if now.get(name, now) is not attributes.get(name, now)
            ]
            now.clear()
            now.update(attributes)
            for name, (content, copied) in containers.items():
                if not _same(content, copied):
                    changed.append(name)
                    content.clear()
                    getattr(content, "extend" if isinstance(content, list) else "update")(copied)
        used_rng = random.getstate() != python or _numpy_state() != numpy
        if used_rng:
            random.setstate(python)
            if numpy is not None:
                sys.modules["numpy"].random.set_state(numpy)
    if changed:
        raise Untraceable(f"it changes {', '.join(sorted(set(changed)))}")
    if used_rng:
        raise Untraceable("it draws random numbers in Python")


def _containers(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    return {
        name: (value, copy.copy(value))
        for name, value in vars(module).items()
        if isinstance(value, (list, dict, set))
    }


def _same(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(key in b and value is b[key] for key, value in a.items())
    return a == b if isinstance(a, set) else all(x is y for x, y in zip(a, b, strict=True))


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    kind, keys, *rest = numpy.random.get_state()
    return (kind, tuple(keys), *rest)


@contextmanager
def _set_training(module: nn.Module, training: bool) -> Iterator[None]:
    """Set `training` without calling train(), which a module may override."""
    if module.training == training:  # keep the children's flags, which may differ
        yield
        return
    before = [(each, each.training) for each in module.modules()]
    try:
        for each, _ in before:
            each.training = training
        yield
    finally:
        for each, mode in before:
            each.training = mode


@contextmanager
def _record_reads(module: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the attributes of `module` that are read."""
    reads: set[str] = set()
    kind: Any = type(module)
    own, before = "__getattribute__" in vars(kind), kind.__getattribute__

    def read(self: nn.Module, name: str) -> Any:
        if self is module:
            reads.add(name)
        return before(self, name)

    kind.__getattribute__ = read
    try:
        yield reads
    finally:
        if own:
            kind.__getattribute__ = before
        else:
            del kind.__getattribute__


def _chain_in_place(graph: fx.Graph) -> None:
    """Let users of a tensor after an in-place method use the method's result, which is the same tensor."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changed = node.args[0] if node.args else None
        if not isinstance(changed, fx.Node):
            continue
        later = [user for user in changed.users if order[user] > order[node]]
        if node.op == "call_method" and is_in_place(node):
            for user in later:
                user.replace_input_with(changed, node)
        elif node.target in _AUGMENTED.values() and later:  # in place for a tensor, but not for a number
            raise Untraceable(f"it uses a value again after {node.target.__name__}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:120] if text else type(error).__name__
