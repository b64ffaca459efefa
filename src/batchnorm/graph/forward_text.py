"""Static analysis of the source of a forward that cannot be traced: whether it only calls its children as a whole."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Literal

from torch import nn

from batchnorm.graph.modules import is_patched

Use = Literal["whole", "elements", "opened"]


def reaches_into(module: nn.Module, layer: nn.Module) -> bool:
    """Whether `module`, which cannot be traced, may call `layer` other than through its children.

    False is certain: each child that contains `layer` is only called as a whole, or is a list whose elements are.
    """
    if type(module).__module__.startswith("torch.") and not isinstance(module, nn.Sequential):
        return False  # DataParallel, a compiled module, ...: they call the wrapped module
    uses = None if is_patched(module) else _uses(module)
    for name, child in module.named_children():
        if not any(each is layer for each in child.modules()):
            continue
        use = "opened" if uses is None else uses.get(name, "whole")
        if use == "opened" or child is layer:
            return True
        if use == "elements" and any(element is layer for element in child.children()):
            return True
    return False


def _uses(module: nn.Module) -> dict[str, Use] | None:
    """How the forward of `module` and the methods it calls use each child; None if this cannot be determined."""
    uses: dict[str, Use] = {}
    kind, visited, pending = type(module), set[str](), ["forward"]
    while pending:
        method = pending.pop()
        if method in visited:
            continue
        visited.add(method)
        for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            if method not in vars(owner):
                continue
            function = _parse_function(getattr(owner, method))
            if function is None or not function.args.args:
                return None
            for name, use in _attribute_uses(function):
                if name is None:
                    return None
                if name in module._modules:
                    uses[name] = max(use, uses.get(name, "whole"), key=_SEVERITY.index)
                elif callable(getattr(nn.Module, name, None)) and name not in _SAFE_METHODS:
                    return None  # children(), named_modules(), get_submodule(), ...
                elif name in ("_modules", "__dict__"):
                    return None
                elif callable(getattr(kind, name, None)) or isinstance(getattr(kind, name, None), property):
                    pending.append(name)
    return uses


_SEVERITY: list[Use] = ["whole", "elements", "opened"]
_SAFE_METHODS = ("forward", "train", "eval", "parameters", "state_dict", "requires_grad_", "__init__")


def _parse_function(method: object) -> ast.FunctionDef | None:
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(method)))  # type: ignore[arg-type]
        found = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return found if isinstance(found, ast.FunctionDef) else None


def _attribute_uses(function: ast.FunctionDef) -> Iterator[tuple[str | None, Use]]:
    """Each attribute of self in a method, and its use. A name of None means that self itself is passed on."""
    self_name = function.args.args[0].arg
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    called = {node.func for node in ast.walk(function) if isinstance(node, ast.Call)}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and _is_super(node.value):
            yield node.attr, "whole"
        if not (isinstance(node, ast.Name) and node.id == self_name):
            continue
        attribute = parents[node]
        if not (isinstance(attribute, ast.Attribute) and attribute.value is node):
            call = parents[node]
            if not _is_super(call):
                yield None, "opened"
            continue
        yield attribute.attr, _use(attribute, called, parents, function)


def _use(
    attribute: ast.Attribute,
    called: set[ast.expr],
    parents: dict[ast.AST, ast.AST],
    function: ast.FunctionDef,
) -> Use:
    parent = parents[attribute]
    if attribute in called or (isinstance(parent, ast.If | ast.IfExp) and parent.test is attribute):
        return "whole"
    if isinstance(parent, ast.Compare) and all(isinstance(each, ast.Is | ast.IsNot) for each in parent.ops):
        return "whole"
    if isinstance(parent, ast.Subscript) and parent.value is attribute and parent in called:
        return "elements"
    if _only_elements_are_called(attribute, parents, function):
        return "elements"
    return "opened"


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _only_elements_are_called(
    attribute: ast.Attribute, parents: dict[ast.AST, ast.AST], function: ast.FunctionDef
) -> bool:
    """Whether `attribute` is the iterable of a `for` loop that does nothing with an element but call it."""
    node: ast.AST = attribute
    last = False  # whether only the last loop variable is the element
    while isinstance(parent := parents[node], ast.Call | ast.Attribute):
        if isinstance(parent, ast.Attribute) and parent.attr not in ("values", "items"):
            return False
        if isinstance(parent, ast.Call) and parent.func is not node:
            if not (isinstance(parent.func, ast.Name) and parent.func.id in ("enumerate", "zip", "reversed")):
                return False
            last |= parent.func.id == "enumerate"
        last |= isinstance(parent, ast.Attribute) and parent.attr == "items"
        node = parent
    if not (isinstance(parent, ast.For) and parent.iter is node):
        return False
    names = [each.id for each in ast.walk(parent.target) if isinstance(each, ast.Name)]
    elements = names[-1:] if last else names
    return all(
        isinstance(use.ctx, ast.Store) or (isinstance(parents[use], ast.Call) and parents[use].func is use)  # type: ignore[attr-defined]
        for use in ast.walk(function)
        if isinstance(use, ast.Name) and use.id in elements
    )
