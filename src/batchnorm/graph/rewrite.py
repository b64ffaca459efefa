"""Replace the forward of a module by changing its class to a new subclass of it.

A subclass, and not an instance attribute `forward`, because torch uses the class in many places: torch.fx traces
type(model).forward, and DataParallel copies the attributes. These would run the old forward with the fused layers.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import importlib
import inspect
import math
import operator
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from batchnorm.graph.modules import InPlaceOfLayer
from batchnorm.kernels.call import Activation
from batchnorm.kernels.reference import ACTIVATIONS, activate
from batchnorm.layers import _BatchNorm

_MARK = "_batchnorm_rewritten"


class Unwritable(Exception):
    """The graph cannot be converted to code; the message says why."""


@dataclass(frozen=True)
class Source:
    """A graph as picklable code: its text, and the imports of the names that it uses."""

    text: str
    names: tuple[tuple[str, str, str], ...]  # (name, module, path): from module import path as name

    @classmethod
    def of(cls, graph: fx.Graph) -> Source:
        code = graph.python_code("self")
        names = []
        for name, value in sorted(code.globals.items()):
            if name == "__builtins__":
                continue
            module, path = _import_path(value)
            names.append((name, module, path))
        return cls(code.src, tuple(names))

    def function(self) -> Callable[..., Any]:
        names = {name: _import(module, path) for name, module, path in self.names}
        exec(compile(self.text, f"<upgraded forward {hash(self) & 0xFFFFFFFF:08x}>", "exec"), names)
        return names["forward"]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Rewriting:
    """A rewritten forward, and the conditions (guards) under which it is valid; made of plain values, so picklable."""

    training: Source
    evaluation: Source
    inputs: tuple[
        tuple[str, str], ...
    ]  # name, and "Tensor" or "list"; other arguments must have their defaults
    attributes: tuple[tuple[str, str, Any], ...]  # constants of the graph: path of the module, name and value
    children: tuple[
        tuple[str, tuple[str, ...]], ...
    ]  # names of the children of the module and of inlined modules
    layers: tuple[str, ...]  # the paths of the fused layers

    def arguments(
        self, module: nn.Module, defaults: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any] | None:
        """The inputs of the graph, or None if a guard fails and the original forward must run."""
        given = {**dict(zip(defaults, args, strict=False)), **kwargs}
        if len(args) + len(kwargs) != len(given):
            return None
        values = []
        for name, kind in self.inputs:
            value = given.pop(name, None)
            if not isinstance(value, (list, tuple) if kind == "list" else (Tensor, fx.Proxy)):
                return None
            values.append(value)
        for name, value in given.items():
            if name not in defaults or value is not defaults[name]:
                return None
        for path, names in self.children:
            if _children(_find(module, path)) != names:
                return None
        for path, name, value in self.attributes:
            now = getattr(_find(module, path), name, _MARK)
            if type(now) is not type(value) or now != value:
                return None
        for path in self.layers:
            layer = _find(module, path)
            if not isinstance(layer, _BatchNorm | InPlaceOfLayer) or layer.activation is None:
                return None  # replaced, or its activation was changed
        return values


def rewrite(module: nn.Module, rewriting: Rewriting) -> None:
    """Replace the forward of `module` by `rewriting`.

    Raises: TypeError when its class cannot be extended.
    """
    kind: Any = type(module)
    module.__class__ = _subclass(kind, rewriting)
    for path in rewriting.layers:
        layer = _find(module, path)
        if isinstance(layer, _BatchNorm):
            vars(layer)["restorable"] = layer.activation


def is_graph(module: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Whether `module` is an fx.GraphModule with plain arguments, whose graph can be changed directly."""
    return (
        isinstance(module, fx.GraphModule)
        and type(module).__base__ is fx.GraphModule  # each instance has its own class
        and type(module.graph._codegen) is fx.graph.CodeGen
        and not any(node.op == "placeholder" and node.args for node in module.graph.nodes)
    )


def is_rewritten(module: nn.Module) -> bool:
    return hasattr(type(module), _MARK)


def restore(module: nn.Module) -> None:
    """Give `module` its old forward back; its layers no longer apply what was fused.

    Raises: Unwritable, if its class was changed again since it was rewritten.
    """
    kind = type(module)
    if _MARK not in vars(kind):
        raise Unwritable(f"its class became {kind.__name__} after its forward was rewritten")
    assert kind.__base__ is not None
    _restore(module, kind.__base__, vars(kind)[_MARK])


def check_writable(module: nn.Module) -> None:
    """Raises: Unwritable, if a subclass would change more than the forward."""
    kind = type(module)
    if is_graph(module):
        return
    if is_rewritten(module):
        raise Unwritable(f"the forward of {kind.__name__} has been rewritten already")
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        raise Unwritable(f"{kind.__name__} defines its own __reduce__")


def guarded_children(
    module: nn.Module, inlined: dict[str, nn.Module]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("", _children(module)), *((path, _children(each)) for path, each in inlined.items()))


def add_residual(layer: _BatchNorm | InPlaceOfLayer, x: Tensor, residual: Any, in_place: bool) -> Tensor:
    """layer(x, residual), if that equals the model's own addition and activation; else these."""
    if any(isinstance(value, fx.Proxy) for value in (x, residual)) or isinstance(layer, InPlaceOfLayer):
        return layer(x, residual)  # type: ignore[no-any-return]
    if isinstance(residual, Tensor):
        if residual.shape == x.shape and (in_place or residual.dtype == x.dtype):
            return layer(x, residual)  # type: ignore[no-any-return]
        same_dtype = in_place or torch.promote_types(x.dtype, residual.dtype) == x.dtype
        if same_dtype and torch.broadcast_shapes(x.shape, residual.shape) == x.shape:
            return layer(x, residual.expand_as(x))  # type: ignore[no-any-return]
    activation, layer.activation = layer.activation, None
    try:
        output = layer(x)
    finally:
        layer.activation = activation
    return activate(output + residual, activation)


def split_calls(module: fx.GraphModule, layer: _BatchNorm) -> bool:
    """Let the graph of `module` add and activate after each call of `layer`, which did so itself.

    Returns: whether it calls it.

    Raises: Unwritable, if the activation cannot be written into a graph.
    """
    paths = {name for name, each in module.named_modules(remove_duplicate=False) if each is layer}
    called, graph = False, copy.deepcopy(module.graph)
    for node in list(graph.nodes):
        if node.op == "call_module":
            path, arguments = str(node.target), (*node.args, None)[:2]
        elif node.target is add_residual:
            path, arguments = str(node.args[0].target), node.args[1:3]
        else:
            continue
        if path in paths:
            called = True
            _split(node, path, arguments, layer.activation)
    if called:
        module.graph = graph
    return called


def _split(node: fx.Node, path: str, arguments: Sequence[Any], activation: Activation) -> None:
    graph, (x, residual) = node.graph, arguments
    with graph.inserting_before(node):
        new = graph.call_module(path, (x,))
        if residual is not None:
            new = graph.call_function(operator.add, (new, residual))
        match activation:
            case nn.LeakyReLU(negative_slope=slope):
                new = graph.call_function(nn.functional.leaky_relu, (new, slope))
            case str(name):
                new = graph.call_function(ACTIVATIONS[name], (new,))
            case other:
                raise Unwritable(f"its activation {other!r} cannot be written into a graph")
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and not argument.users:
            graph.erase_node(argument)


def _find(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in filter(None, path.split(".")):
        found = None if found is None else found._modules.get(name)
    return found


def _children(module: nn.Module | None) -> tuple[str, ...]:
    return (
        () if module is None else tuple(name for name, child in module._modules.items() if child is not None)
    )


@functools.cache  # modules with the same rewriting share their class, as they did before
def _subclass(base: Any, rewriting: Rewriting) -> type[nn.Module]:
    functions = {True: rewriting.training.function(), False: rewriting.evaluation.function()}
    old: Callable[..., Any] = base.forward
    _, *signature = inspect.signature(old).parameters.values()
    defaults = {each.name: each.default for each in signature}

    @functools.wraps(old)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        values = rewriting.arguments(self, defaults, args, kwargs)
        if values is None:
            _restore(self, base, rewriting)
            return old(self, *args, **kwargs)
        return functions[self.training](self, *values)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = object.__reduce_ex__(self, max(int(protocol), 2))
        constructor, (kind, *rest), *state = reduced
        assert constructor is copyreg.__newobj__ and kind is type(self)  # type: ignore[attr-defined]
        return reconstruct, (base, rewriting, *rest), *state

    names = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        _MARK: rewriting,
    }
    return types.new_class(base.__name__, (base,), exec_body=lambda space: space.update(names))


def reconstruct(base: Any, rewriting: Rewriting, *args: Any) -> nn.Module:
    """What the pickle of a rewritten module calls; it runs the code that the pickle holds, as any pickle may."""
    kind = _subclass(base, rewriting)
    return kind.__new__(kind, *args)


def _restore(module: nn.Module, base: type[nn.Module], rewriting: Rewriting) -> None:
    """Restore the original class of `module`, and remove the activations of its fused layers."""
    for path in rewriting.layers:
        layer = _find(module, path)
        if isinstance(layer, _BatchNorm):
            layer.activation = None
            vars(layer).pop("restorable", None)
    module.__class__ = base


def _import_path(value: Any) -> tuple[str, str]:
    """The module and the path from which `value` can be imported."""
    if isinstance(value, types.ModuleType):
        return value.__name__, ""
    if isinstance(value, float):
        return "math", "nan" if math.isnan(value) else "inf"
    found: list[tuple[str, str]] = []
    if value is type(None):
        found.append(("types", "NoneType"))
    name = str(getattr(value, "__name__", ""))
    found.append((str(getattr(value, "__module__", "")), str(getattr(value, "__qualname__", name))))
    try:
        module, _, path = fx.node._get_qualified_name(value).rpartition(".")
        found.append((module, path))
    except Exception:  # it supports functions only
        pass
    for module, path in found:
        try:
            if _import(module, path) is value:
                return module, path
        except (ImportError, AttributeError, ValueError):
            continue
    raise Unwritable(f"it uses {name or value}, which cannot be imported by name")


def _import(module: str, path: str) -> Any:
    value: Any = importlib.import_module(module)
    for name in filter(None, path.split(".")):
        value = getattr(value, name)
    return value
