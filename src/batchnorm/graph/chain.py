"""The fusion pattern: a layer of ours, an optional residual add, and an activation that has a kernel."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from batchnorm.graph.modules import activation_of, has_hooks, is_ours, leaky_relu
from batchnorm.graph.rewrite import add_residual
from batchnorm.graph.trace import Trace, is_in_place, is_plain_identity
from batchnorm.kernels.call import Activation


class Unfusable(Exception):
    """A layer cannot be fused; the message says why."""


@dataclass
class Chain:
    """A call of a layer and the nodes after it that can be fused; each value has the next node as its only user."""

    layer: fx.Node
    activation: Activation
    last: fx.Node  # the activation
    intermediate: list[fx.Node]  # identities and the addition
    add: fx.Node | None = None
    residual: fx.Node | None = None

    @property
    def what(self) -> str:
        named = self.activation if isinstance(self.activation, str) else str(self.activation)
        return named if self.add is None else f"residual, {named}"


def follow(layer: fx.Node, trace: Trace, module: nn.Module) -> Chain:
    """The chain that begins at `layer`, a call in `trace` of the forward of `module`.

    Raises: Unfusable.
    """
    if len(layer.args) != 1 or layer.kwargs:
        raise Unfusable("is not called with its input alone")
    value, intermediate = layer, list[fx.Node]()
    add = residual = None
    while True:
        user = _only_user(value)
        child = module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if child is not None and is_plain_identity(child):
            intermediate.append(user)
            value = user
            continue
        other = _added_operand(user, value) if add is None else None
        if other is not None:
            add, residual = user, other
            intermediate.append(user)
            value = user
            continue
        chain = Chain(layer, _activation(user, child), user, intermediate, add, residual)
        _check(chain, trace, module)
        return chain


def activation_module(module: nn.Module) -> Activation:
    """The value of a layer's `activation` that is equivalent to `module`.

    Raises: Unfusable.
    """
    if has_hooks(module):
        raise Unfusable(f"{type(module).__name__}, which follows, has hooks")
    found = activation_of(module)
    if found is not None:
        return found
    if type(module).__module__ == nn.modules.activation.__name__:
        raise Unfusable(f"{type(module).__name__} has no fused kernel")
    raise Unfusable(f"no activation follows, but {type(module).__name__}")


def _only_user(value: fx.Node) -> fx.Node:
    users = list(value.users)
    if len(users) != 1:
        raise Unfusable(f"its output is used {len(users)} times")
    if users[0].op == "output":
        raise Unfusable("no activation follows")
    if value in users[0].kwargs.values() or sum(value is each for each in users[0].all_input_nodes) != 1:
        raise Unfusable("its output is used as a keyword")
    return users[0]


def _added_operand(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """The other operand, if `node` is an addition to `value`; else None."""
    in_place = node.target in (operator.iadd, "add_")
    if node.target not in (operator.add, operator.iadd, torch.add, "add", "add_") or len(node.args) != 2:
        return None
    if node.kwargs and dict(node.kwargs) != {"alpha": 1}:
        return None
    first, second = node.args
    other = second if first is value else first
    if not isinstance(other, fx.Node) or other is value or (in_place and first is not value):
        return None
    return other


def _activation(node: fx.Node, child: nn.Module | None) -> Activation:
    if child is not None:
        if len(node.args) != 1 or node.kwargs:
            raise Unfusable("no activation follows")
        return activation_module(child)
    target = cast(Any, node.target)
    arguments = dict(node.kwargs)
    arguments.pop("inplace", None)
    if target in _BY_FUNCTION and not arguments and _is_plain(node.args[1:]):
        return _BY_FUNCTION[target]
    if target in (F.leaky_relu, torch.nn.functional.leaky_relu_):
        slope = (
            (*node.args[1:2], 0.01)[0] if "negative_slope" not in arguments else arguments["negative_slope"]
        )
        if isinstance(slope, float | int):
            return leaky_relu(float(slope))
    if target in (F.hardtanh,) and [*node.args[1:3], *arguments.values()] == [0, 6]:
        return "relu6"
    name = str(getattr(target, "__name__", target))
    if target is add_residual:
        raise Unfusable("is the residual of another layer")
    if name in _WITHOUT_KERNEL:
        raise Unfusable(f"{name} has no fused kernel")
    raise Unfusable(f"no activation follows, but {name}")


def _is_plain(rest: tuple[Any, ...]) -> bool:
    return all(isinstance(each, bool) for each in rest)  # inplace


def _check(chain: Chain, trace: Trace, module: nn.Module) -> None:
    method = next((trace.methods[node] for node in [chain.layer, chain.last] if node in trace.methods), None)
    # other callers of the method apply the activation again, which is harmless only if it is idempotent
    if method is not None and (chain.add is not None or chain.activation not in ("relu", "relu6")):
        raise Unfusable(f"is called in {method}(), which others may call too")
    if chain.add is not None:
        source = chain.layer.args[0]
        if isinstance(source, fx.Node) and _may_change(source, chain.layer, chain.add, module):
            raise Unfusable("its input may be modified in place before the residual is added")


def _may_change(source: fx.Node, layer: fx.Node, add: fx.Node, module: nn.Module) -> bool:
    """Whether a tensor that may share memory with `source` may be written after `layer` and before `add`."""
    aliases, pending = {source}, [source]
    while pending:
        node = pending.pop()
        neighbours = [user for user in node.users if not _is_fresh(user, module)]
        if not _is_fresh(node, module):
            neighbours += node.all_input_nodes
        pending += [neighbour for neighbour in neighbours if neighbour not in aliases]
        aliases.update(neighbours)
    node = layer.next
    while node is not add:
        if _writes(node, module) and not aliases.isdisjoint(node.all_input_nodes):
            return True
        node = node.next
    return False


def _is_fresh(node: fx.Node, module: nn.Module) -> bool:
    """Whether the output of `node` is known to share no memory with its inputs."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _FRESH)
    return node.op in ("get_attr", "output") or node.target in (
        operator.add,
        operator.mul,
        torch.cat,
        torch.add,
    )


def _writes(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        return not isinstance(child, _FRESH) and any(
            getattr(each, "inplace", False) or type(each).__module__.partition(".")[0] != "torch"
            for each in child.modules()
            if not is_ours(each)
        )
    return is_in_place(node)


_FRESH = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear)
_BY_FUNCTION: dict[str | Callable[..., Any], Activation] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", torch.sigmoid_: "sigmoid",
    "sigmoid": "sigmoid", "sigmoid_": "sigmoid",
    F.tanh: "tanh", torch.tanh: "tanh", torch.tanh_: "tanh", "tanh": "tanh", "tanh_": "tanh",
}  # fmt: skip
_WITHOUT_KERNEL = {
    "gelu", "hardswish", "hardsigmoid", "mish", "elu", "elu_", "celu", "selu", "softplus", "prelu", "rrelu", "hardtanh",
    "softsign", "logsigmoid", "hardshrink", "softshrink", "tanhshrink", "threshold", "leaky_relu", "softmax",
}  # fmt: skip
