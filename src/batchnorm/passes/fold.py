"""Fold batch normalization in evaluation into the linear operations before it.

    W·x + b, then s·y + t, is s·W·x + (s·b + t)

It works on a copy, whose class, children's names and forward stay: a folded layer's place is taken by what follows the
normalization in it, an Identity if nothing does. What comes before a layer is observed in one run
(graph/observation.py), so that reshapes, concatenation, sums and pooling may lie in between (graph/sources.py).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.graph.modules import has_hooks, is_normalization, is_patched
from batchnorm.graph.observation import (
    BATCH_NORM,
    Observation,
    Operation,
    Value,
    behind_layout,
    observe,
)
from batchnorm.graph.sources import NotLinear, Source, Term, sources
from batchnorm.layers import _BatchNorm
from batchnorm.moments import Affine
from batchnorm.passes.report import LayerReport, Report


class _Left(Exception):
    """A layer that cannot be folded; the message says why."""


@dataclass(frozen=True)
class _Plan:
    """How one layer is folded: by scaling and shifting parameters, and by what takes its place.

    scales, shifts: of a parameter or buffer, by its value; of its shape but for dimensions of size 1. A missing bias is
        a shift of the weight's value.
    """

    path: str
    scales: dict[Value, Tensor]
    shifts: dict[Value, Tensor]
    new_biases: dict[Value, Tensor]
    into: tuple[str, ...]
    instead: nn.Module


def fold_into_preceding(model: nn.Module, *inputs: Any, **keywords: Any) -> tuple[nn.Module, Report]:
    """A copy of `model` in evaluation mode, with BN folded into the linear operations before it, and what was done.

    Args:
        model: any module; it is not changed.
        inputs: of its forward, for example; layers that are not called with them are left alone.
        keywords: of its forward.

    Returns:
        The copy, and a report with a line for each normalization layer.
    """
    folded = copy.deepcopy(model).eval()
    done: dict[str, LayerReport] = {}
    while True:
        seen = observe(folded, *inputs, **keywords)
        plans, left = _plans(folded, seen)
        if not plans:
            break
        for plan in plans:
            _apply(folded, plan)
            done[plan.path] = LayerReport(plan.path, "folded", "into " + ", ".join(plan.into))
    names = [name for name, module in model.named_modules() if is_normalization(module)]
    return folded, Report(tuple(done.get(name) or left.get(name) or _uncalled(name) for name in names))


def _uncalled(name: str) -> LayerReport:
    return LayerReport(name, "left alone", why="was not called with these inputs")


def _plans(model: nn.Module, seen: Observation) -> tuple[list[_Plan], dict[str, LayerReport]]:
    """Plans that do not meet in a parameter, and why the other layers are left."""
    calls: dict[nn.Module, list[Operation]] = defaultdict(list)
    for operation in seen.operations:
        if operation.name in BATCH_NORM and operation.call is not None:
            calls[operation.call.module].append(operation)
    plans: list[_Plan] = []
    left: dict[str, LayerReport] = {}
    taken: set[Value] = set()
    for module, operations in calls.items():
        path = seen.calls_of(module)[0].path
        try:
            plan = _plan(model, seen, module, operations)
        except (_Left, NotLinear) as why:
            left[path] = LayerReport(path, "left alone", why=str(why))
            continue
        touched = {*plan.scales, *plan.shifts, *plan.new_biases}
        if not taken & touched:  # else in the next round
            taken |= touched
            plans.append(plan)
    return plans, left


def _plan(model: nn.Module, seen: Observation, module: nn.Module, operations: list[Operation]) -> _Plan:
    if len(operations) != len(seen.calls_of(module)):
        raise _Left("normalizes several times in one call")
    if has_hooks(module):
        raise _Left("has hooks, which see its output")
    path = seen.calls_of(module)[0].path
    wanted = _Wanted(model, path)
    for operation in operations:
        value = operation.reads[0]
        if value.only_user is not operation:
            raise _Left("its input is read elsewhere too")
        affine = _affine(model, operation)
        found, terms = sources(value)
        wanted.add(found, terms, affine)
    wanted.check()
    return _Plan(path, wanted.scales, wanted.shifts, wanted.new_biases, tuple(wanted.into), _rest_of(module))


class _Wanted:
    """What the calls of a layer want of parameters; they must agree, and nothing else may read them."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.model, self.path = model, path
        self.scales: dict[Value, Tensor] = {}
        self.shifts: dict[Value, Tensor] = {}
        self.new_biases: dict[Value, Tensor] = {}
        self.into: dict[str, None] = {}
        self._readers: dict[Value, set[Operation]] = defaultdict(set)

    def add(self, found: list[Source], terms: list[Term], affine: Affine) -> None:
        """What one call wants: each source and term scaled, and each channel shifted once, where there is a bias."""
        shifted = torch.zeros(len(affine.scale), dtype=torch.bool)

        def shift(channels: Tensor, signs: Tensor, may: Tensor) -> Tensor:
            new = (channels >= 0) & (may & ~shifted)[channels.clamp(min=0)]
            shifted[channels[new]] = True
            return torch.where(new, signs * _by_channel(affine.shift, channels, 0.0), 0.0)

        anywhere = torch.ones_like(shifted)
        for source in found:
            home = _home(source)
            if has_hooks(self.model.get_submodule(home)):
                raise _Left(f"{home} has hooks, which see its output")
            self.into[home] = None
            scale = _by_channel(affine.scale, source.channels, 1.0)
            self._want(self.scales, source.weight, _on_weight(scale, source))
            self._readers[source.weight].add(source.operation)
            if source.bias is not None:
                self._want(self.scales, source.bias, scale)
                self._want(self.shifts, source.bias, shift(source.channels, source.signs, anywhere))
                self._readers[source.bias].add(source.operation)
        for term in terms:
            self._want(self.scales, term.value, _by_channel(affine.scale, term.channels, 1.0))
            self._want(self.shifts, term.value, shift(term.channels, term.signs, term.everywhere))
            self._readers[term.value] |= set(term.value.users)
        for source in found:
            if source.bias is None and _may_have_bias(self.model, source):
                self._want(self.new_biases, source.weight, shift(source.channels, source.signs, anywhere))
        if not bool((shifted | (affine.shift == 0)).all()):
            raise _Left("the operation before it has no place for a bias")

    def check(self) -> None:
        for value, readers in self._readers.items():
            users = {_behind_turn(user) for user in value.users}
            if not users <= {_behind_turn(reader) for reader in readers}:
                raise _Left(f"{value.name} is read by others too")

    def _want(self, place: dict[Value, Tensor], value: Value, wanted: Tensor) -> None:
        before = place.setdefault(value, wanted)
        if before is not wanted and not torch.equal(before, wanted):
            raise _Left(f"{value.name} is used twice, by layers that want it scaled differently")


def _behind_turn(operation: Operation) -> Operation:
    """The operation that reads the transposed weight, for the transposition of one."""
    if operation.name == "aten.t" and len(operation.results[0].users) == 1:
        return operation.results[0].users[0]
    return operation


def _by_channel(values: Tensor, channels: Tensor, otherwise: float) -> Tensor:
    return torch.where(channels >= 0, values[channels.clamp(min=0)], otherwise)


def _on_weight(scale: Tensor, source: Source) -> Tensor:
    """The scale of each output, in the shape that broadcasts against the weight."""
    shape = source.weight.shape
    if source.output_dim == 0:
        return scale.view(-1, *[1] * (len(shape) - 1))
    groups = source.operation.arguments[8]  # of a transposed convolution: (in, out / groups, ...)
    of_group = scale.view(groups, 1, -1).expand(groups, shape[0] // groups, -1).flatten(0, 1)
    return of_group.view(shape[0], shape[1], *[1] * (len(shape) - 2))


def _home(source: Source) -> str:
    return source.weight.name.rpartition(".")[0]


def _may_have_bias(model: nn.Module, source: Source) -> bool:
    """Whether the module whose weight it is has a place for a bias that its forward reads."""
    module = model.get_submodule(_home(source))
    return (
        source.operation.call is not None
        and source.operation.call.module is module
        and isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        and module._parameters.get("bias", module) is None
        and not is_patched(module)
    )


def _affine(model: nn.Module, operation: Operation) -> Affine:
    """What a call of a normalization computes, in float64."""
    arguments = operation.arguments
    if operation.name == "batchnorm.forward":
        _, weight, bias, _, mean, variance, eps = arguments[:7]
        training = mean is None
    else:
        _, weight, bias, mean, variance, training = arguments[:6]
        eps = arguments[7]
    if training or mean is None or variance is None:
        raise _Left("normalizes by the batch in evaluation too")

    def tensor(value: Value | None) -> Tensor | None:
        if value is None:
            return None
        value = behind_layout(value)
        if value.kind not in ("parameter", "buffer"):
            raise _Left("its statistics or parameters are computed")
        found = dict(model.named_parameters()).get(value.name)
        return (found if found is not None else model.get_buffer(value.name)).detach().double()

    found_mean, found_variance = tensor(mean), tensor(variance)
    assert found_mean is not None and found_variance is not None
    return Affine.normalising(found_mean, found_variance, tensor(weight), tensor(bias), eps)


def _rest_of(module: nn.Module) -> nn.Module:
    """What a layer does after it has normalized."""
    if isinstance(module, _BatchNorm):
        raise _Left("is batchnorm's own")  # its activation and residual
    if type(module).forward in (
        nn.BatchNorm1d.forward,
        nn.BatchNorm2d.forward,
        nn.BatchNorm3d.forward,
        nn.SyncBatchNorm.forward,
    ):
        return nn.Identity()
    parts = [getattr(module, name, None) for name in ("drop", "act")]
    if type(module).__name__.startswith("BatchNormAct") and all(
        isinstance(part, nn.Module) for part in parts
    ):
        real = [part for part in parts if isinstance(part, nn.Module) and not isinstance(part, nn.Identity)]
        return nn.Sequential(*real) if len(real) > 1 else real[0] if real else nn.Identity()
    raise _Left(f"is {type(module).__name__}, whose forward is not known")


def _apply(model: nn.Module, plan: _Plan) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for value in {**plan.scales, **plan.shifts}:
            old = tensors[value.name]
            new = old.double()
            if value in plan.scales:
                new = new * plan.scales[value]
            if value in plan.shifts:
                new = new + plan.shifts[value]
            old.copy_(new)
        for weight, shift in plan.new_biases.items():
            module = model.get_submodule(weight.name.rpartition(".")[0])
            of = tensors[weight.name]
            module.bias = nn.Parameter(shift.to(of.dtype).to(of.device), requires_grad=of.requires_grad)
    for path in _paths(model, plan.path):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, plan.instead)


def _paths(model: nn.Module, path: str) -> Iterator[str]:
    """All paths of the module at `path`."""
    module = model.get_submodule(path)
    yield from [name for name, each in model.named_modules(remove_duplicate=False) if each is module]
