"""Residual branches as they were seen: the normalization that a branch ends with, before it is added to its shortcut.

A branch is the operand of a sum that has a nonlinearity between itself and a value that the other operand, its
shortcut, comes from with none in between: F(x) beside x, or beside a projection of x.
"""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.graph.modules import normalizes
from batchnorm.graph.nonlinearity import NONLINEAR
from batchnorm.graph.observation import BATCH_NORM, LAYOUT, ModuleCall, Observation, Operation, Value

_ADDS = frozenset({"aten.add", "aten.add_", "aten.sub", "aten.sub_"})
_BENDS = NONLINEAR | {
    f"aten.{name}{_}"
    for name in ("max_pool2d_with_indices", "_softmax", "_safe_softmax", "square", "pow", "exp")
    for _ in ("", "_")
}
# of zeros they make zeros, and hand a gradient on
_KEEP_ZERO = LAYOUT | frozenset(
    {"aten.mul", "aten.mul_", "aten.div", "aten.div_", "aten.native_dropout", "aten.avg_pool2d", "aten.mean"}
    | {
        "aten.constant_pad_nd",
        "aten._adaptive_avg_pool2d",
        "aten.upsample_nearest2d",
        "aten.upsample_bilinear2d",
    }
    | {"aten._to_copy", "aten.neg"}
    # activations that have a slope at 0, unlike ReLU
    | {
        f"aten.{name}{_}"
        for name in ("silu", "leaky_relu", "gelu", "tanh", "mish", "elu", "hardswish")
        for _ in ("", "_")
    }
    | {"aten._prelu_kernel"}
)


def ends(seen: Observation) -> list[ModuleCall]:
    """The calls of the normalization layers that residual branches end with, in order."""
    return _Ends(seen).found()


class _Ends:
    def __init__(self, seen: Observation) -> None:
        self._seen = seen
        self._straight: dict[Value, frozenset[Value]] = {}
        self._all: dict[Value, frozenset[Value]] = {}

    def found(self) -> list[ModuleCall]:
        calls: dict[ModuleCall, None] = {}
        for operation in self._seen.operations:
            for branch, shortcut in _sums(operation):
                if not self._is_branch(branch, shortcut):
                    continue
                fused = operation.name in BATCH_NORM
                last = operation if fused else _normalization(branch)
                call = None if last is None else _of_layer(last.call)
                if call is not None:
                    calls.setdefault(call)
        return list(calls)

    def _is_branch(self, branch: Value, shortcut: Value) -> bool:
        """Whether `branch` comes through a nonlinearity from what the shortcut comes from with none."""
        beside = self._before(shortcut, straight=True)
        own = self._before(branch, straight=True)
        return bool(beside & (self._before(branch) - own)) and not own & (self._before(shortcut) - beside)

    def _before(self, value: Value, straight: bool = False) -> frozenset[Value]:
        """The values that it comes from, itself with them; `straight`: without a nonlinearity in between."""
        known = self._straight if straight else self._all
        if value not in known:
            found: set[Value] = set()
            waiting = [value]
            while waiting:
                each = waiting.pop()
                if each in found or each.kind in ("parameter", "buffer"):
                    continue
                found.add(each)
                made = each.producer
                if made is not None and not (straight and (made.name in _BENDS or _activates(made))):
                    waiting += made.reads
            known[value] = frozenset(found)
        return known[value]


def _sums(operation: Operation) -> Iterator[tuple[Value, Value]]:
    """The pairs of values that an operation adds, each as the branch once."""
    if operation.name in _ADDS:
        values = [each for each in operation.arguments[:2] if isinstance(each, Value)]
        if len(values) == 2:
            yield values[0], values[1]
            yield values[1], values[0]
    elif operation.name in BATCH_NORM and not operation.name.startswith("aten"):
        residual = operation.argument("residual")
        if isinstance(residual, Value):  # a layer of ours with the sum in it
            yield operation.arguments[0], residual


def _activates(operation: Operation) -> bool:
    """Whether a layer of ours has an activation in it."""
    return (
        operation.name in BATCH_NORM
        and not operation.name.startswith("aten")
        and bool(operation.argument("activation"))
    )


def _normalization(value: Value) -> Operation | None:
    """The normalization that a value comes from, if zeros of it are zeros there and get a gradient."""
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        made = each.producer
        if made is None or each in seen:
            continue
        seen.add(each)
        if made.name in BATCH_NORM and not _activates(made):
            return made
        if made.name in _KEEP_ZERO:
            waiting += made.reads
    return None


def _of_layer(call: ModuleCall | None) -> ModuleCall | None:
    while call is not None and not normalizes(call.module):
        call = call.caller
    return call
