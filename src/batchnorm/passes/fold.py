"""Fold batch normalization in evaluation into the linear operations before it.

    W·x + b, then s·y + t, is s·W·x + (s·b + t)

It works on a copy, whose class, children's names and forward stay: a folded layer's place is taken by what follows the
normalization in it, an Identity if nothing does. What comes before a layer is observed in one run
(graph/observation.py), so that reshapes, concatenation, sums and pooling may lie in between (graph/sources.py). Each
fold is proven: the model computes in float64 what it computed before, from the example inputs and from random ones, or
the fold is undone.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.graph.modules import has_hooks, is_normalization, is_ours, is_patched
from batchnorm.graph.observation import (
    BATCH_NORM,
    ModuleCall,
    Observation,
    Operation,
    Value,
    behind_layout,
    observe,
)
from batchnorm.graph.sources import NotLinear, Source, Term, sources
from batchnorm.kernels.call import Activation
from batchnorm.kernels.reference import activate
from batchnorm.moments import Affine
from batchnorm.passes.report import LayerReport, Report

PROVEN = 1e-9  # of the largest output, in float64


class _Left(Exception):
    """A layer that cannot be folded; the message says why."""


@dataclass(frozen=True)
class _Plan:
    """How one layer is folded: by scaling and shifting parameters, and by what takes its place.

    scales, shifts: of a parameter or buffer, by its value; of its shape but for dimensions of size 1.
    new_biases: where there is none, by the value of the weight beside it.
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
    proof = Proof.of(folded, inputs, keywords)
    done: dict[str, LayerReport] = {}
    undone: dict[str, LayerReport] = {}
    while True:
        seen = observe(folded, *inputs, **keywords)
        found, left = _plans(folded, seen)
        plans = [plan for plan in found if plan.path not in undone]
        if not plans:
            break
        together = _applied(folded, plans)
        if proof.error(together) <= PROVEN:
            folded = together
        else:  # some of them: which, is seen one by one
            for plan in plans:
                alone = _applied(folded, [plan])
                if (error := proof.error(alone)) <= PROVEN:
                    folded = alone
                else:
                    why = f"folded into {', '.join(plan.into)} it would change the output, by {error:.1e}"
                    undone[plan.path] = LayerReport(plan.path, "left alone", why=why)
        done |= {
            plan.path: LayerReport(plan.path, "folded", "into " + ", ".join(plan.into))
            for plan in plans
            if plan.path not in undone
        }
    names = [name for name, module in model.named_modules() if is_normalization(module)]
    every = done | undone | {name: report for name, report in left.items() if name not in undone}
    return folded, Report(tuple(every.get(name) or _uncalled(name) for name in names))


def _applied(model: nn.Module, plans: list[_Plan]) -> nn.Module:
    """A copy of the model, with these layers folded."""
    changed = copy.deepcopy(model)
    for plan in plans:
        _apply(changed, plan)
    return changed


@dataclass(frozen=True)
class Proof:
    """What a model computes, in float64, from the example inputs and from random ones of their shapes."""

    cases: list[tuple[Any, Any, list[Tensor]]]

    @classmethod
    def of(cls, model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Proof:
        example = _as_double((inputs, keywords))
        generator = torch.Generator().manual_seed(0)
        random = tree_map(
            lambda each: (
                torch.randn(each.shape, generator=generator, dtype=each.dtype).to(each.device)
                if isinstance(each, Tensor) and each.is_floating_point()
                else each
            ),
            example,
        )
        wide = copy.deepcopy(model).double()
        return cls([(*given, _outputs(wide, *given)) for given in (example, random)])

    def error(self, model: nn.Module) -> float:
        """The largest difference of an output from what it was, as a share of its largest; inf for other shapes."""
        wide, worst = copy.deepcopy(model).double(), 0.0
        for inputs, keywords, expected in self.cases:
            found = _outputs(wide, inputs, keywords)
            if [each.shape for each in found] != [each.shape for each in expected]:
                return math.inf
            for one, two in zip(found, expected, strict=True):
                largest = two.abs().max().item() if two.numel() else 0.0
                difference = (one - two).abs().max().item() if two.numel() else 0.0
                worst = max(worst, difference / max(largest, 1e-30)) if difference == difference else math.inf
        return worst


def _outputs(model: nn.Module, inputs: Any, keywords: Any) -> list[Tensor]:
    with torch.no_grad():
        returned = model(*inputs, **keywords)
    return [each for each in tree_leaves(returned) if isinstance(each, Tensor) and each.is_floating_point()]


def _as_double(given: Any) -> Any:
    return tree_map(
        lambda each: each.double() if isinstance(each, Tensor) and each.is_floating_point() else each, given
    )


def _uncalled(name: str) -> LayerReport:
    return LayerReport(name, "left alone", why="was not called with these inputs")


@dataclass(frozen=True)
class _Normalization:
    """A call of a layer that multiplies and shifts each channel of `value`, in evaluation."""

    value: Value
    affine: Affine


def _plans(model: nn.Module, seen: Observation) -> tuple[list[_Plan], dict[str, LayerReport]]:
    """Plans that do not meet in a parameter, and why the other layers are left."""
    plans: list[_Plan] = []
    left: dict[str, LayerReport] = {}
    taken: set[Value] = set()
    for module in dict.fromkeys(call.module for call in seen.calls):
        if not is_normalization(module):
            continue
        calls = seen.calls_of(module)
        path = calls[0].path
        try:
            plan = _plan(model, path, calls)
        except (_Left, NotLinear) as why:
            left[path] = LayerReport(path, "left alone", why=str(why))
            continue
        touched = {*plan.scales, *plan.shifts, *plan.new_biases}
        if not taken & touched:  # else in the next round
            taken |= touched
            plans.append(plan)
    return plans, left


def _plan(model: nn.Module, path: str, calls: list[ModuleCall]) -> _Plan:
    module = calls[0].module
    instead = _rest_of(module)
    if has_hooks(module):
        raise _Left("has hooks, which see its output")
    wanted = _Wanted(model)
    for call in calls:
        normalization = _normalization(model, call)
        value, inside = normalization.value, set(map(id, call.operations))
        if value.is_output or any(id(user) not in inside for user in value.users):
            raise _Left("its input is read elsewhere too")
        wanted.add(*sources(value), normalization.affine)
    wanted.check()
    return _Plan(path, wanted.scales, wanted.shifts, wanted.new_biases, tuple(wanted.into), instead)


def _normalization(model: nn.Module, call: ModuleCall) -> _Normalization:
    """What a call of a layer normalizes, and how."""
    module = call.module
    if is_ours(module) or is_frozen(module):
        given = call.given or call.reads  # by position, or else by name
        if any(not value.dtype.is_floating_point for value in call.reads):
            raise _Left("takes a mask")
        if not call.given and len(call.reads) > 1:
            raise _Left("takes its input by name, beside others")
        return _Normalization(given[0], _affine_of(module))
    operations = [operation for operation in call.operations if operation.name in BATCH_NORM]
    if len(operations) != 1:
        raise _Left(f"is {type(module).__name__}, which normalizes {len(operations)} times in a call")
    return _Normalization(operations[0].reads[0], _affine(model, operations[0]))


def _affine_of(module: nn.Module) -> Affine:
    """What a layer of ours, or a frozen one, computes in evaluation, in float64."""
    holder: Any = module.active_statistics() if is_ours(module) else module
    names: Any = (holder.running_mean, holder.running_var, module.weight, module.bias)
    mean, variance, weight, bias = (None if each is None else each.detach().double() for each in names)
    if mean is None or variance is None:
        raise _Left("normalizes by the batch in evaluation too")
    if mean.dim() != 1:
        raise _Left("has statistics of each activation")
    eps: Any = module.eps
    return Affine.normalising(mean, variance, weight, bias, eps)


def is_frozen(module: nn.Module) -> bool:
    """Whether this is a FrozenBatchNorm2d, torchvision's or detectron2's: constants, and no operator of torch's."""
    names = ("running_mean", "running_var", "weight", "bias")
    return (
        type(module).__name__ == "FrozenBatchNorm2d"
        and all(isinstance(module._buffers.get(name), Tensor) for name in names)
        and isinstance(getattr(module, "eps", None), float)
    )


class Activated(nn.Module):
    """What is left of a folded layer of ours: activation(x + residual), called as the layer was."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return activate(input, self.activation, residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class _Wanted:
    """What the calls of a layer want of parameters; they must agree, and nothing else may read them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
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
    _, weight, bias, mean, variance, training = operation.arguments[:6]
    eps = operation.arguments[7]
    if training or mean is None or variance is None:
        raise _Left("normalizes by the batch in evaluation too")

    def tensor(value: Value | None) -> Tensor | None:
        if value is None:
            return None
        value = behind_layout(value)
        if value.kind not in ("parameter", "buffer"):
            raise _Left("its statistics or parameters are computed")
        get = model.get_parameter if value.kind == "parameter" else model.get_buffer
        return get(value.name).detach().double()

    found_mean, found_variance = tensor(mean), tensor(variance)
    assert found_mean is not None and found_variance is not None
    return Affine.normalising(found_mean, found_variance, tensor(weight), tensor(bias), eps)


def _rest_of(module: nn.Module) -> nn.Module:
    """What a layer does after it has normalized."""
    if is_ours(module):
        return Activated(module.activation)
    if is_frozen(module):
        return nn.Identity()
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
