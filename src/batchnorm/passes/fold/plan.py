"""What folding one layer changes, and how it is seen to be right: nothing is changed until a plan is applied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from batchnorm.graph.linear import Linear
from batchnorm.graph.modules import Fused, has_hooks, is_patched
from batchnorm.graph.observation import ModuleCall, Observation, Operation, Value
from batchnorm.graph.replay import Replay
from batchnorm.graph.sources import Origin, sources
from batchnorm.passes.fold.border import make_bordered, map_of
from batchnorm.passes.fold.normalization import Left, Normalization
from batchnorm.passes.report import Outcome

PROVEN = 1e-9  # of the largest value, in float64


class Tensors:
    """The parameters and buffers of a model by name, in float64; and who sees and reads what in it."""

    def __init__(self, model: nn.Module, seen: Observation) -> None:
        self._tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._hooked = {
            value: call.path
            for call in seen.calls
            if has_hooks(call.module)
            for value in (*call.given, *call.returns)
        }
        self._readers: dict[str, list[Operation]] = {}
        for operation in seen.operations:
            for value in operation.reads:
                if value.name:
                    self._readers.setdefault(value.name, []).append(operation)
        self._kept = _kept_in_lists(model)

    def __call__(self, value: Value) -> Tensor:
        return self._tensors[value.name].detach().double()

    def check_changed(self, values: Iterable[Value]) -> None:
        """Raise Left if a hook sees one of the values, which change."""
        for value in values:
            if value in self._hooked:
                raise Left(f"a hook of {self._hooked[value] or 'the model'} sees a value that would change")

    def check_replaced(self, module: nn.Module, calls: Iterable[ModuleCall]) -> None:
        """Raise Left if `module` cannot be replaced: something beside these calls reads its parameters, or has it."""
        if module in self._kept:
            raise Left(f"is also kept in {self._kept[module]}, where it could not be replaced")
        path = next(iter(calls)).path
        inside = {operation for call in calls for operation in call.operations}
        prefix = f"{path}." if path else ""
        for name in [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]:
            if not inside.issuperset(self._readers.get(prefix + name, ())):
                raise Left(f"its {name} is read elsewhere too")


@dataclass(frozen=True, eq=False)
class Check:
    """A part of the network that must compute the same before and after, whatever it is given.

    operations: those of the part.
    targets: what it makes; none: what the normalization makes.
    normalization: the layer that goes, if it is one.
    silenced: values that are 0 afterwards: what is left out computes in another's place.
    passes: whether the layer's output is its input afterwards; else it is 0.
    """

    operations: set[Operation]
    targets: list[Value]
    normalization: Normalization | None = None
    silenced: tuple[Value, ...] = ()
    passes: bool = True

    def error(self, old: Callable[[Value], Tensor], new: Callable[[Value], Tensor], added: Added) -> float:
        """The largest difference of random values, as a share of the largest of the target."""
        random: dict[Value, Tensor] = {}
        generator = torch.Generator().manual_seed(0)

        def otherwise(tensor: Callable[[Value], Tensor], value: Value) -> Tensor:
            if value.kind in ("parameter", "buffer"):
                return tensor(value)
            if value not in random:
                random[value] = torch.randn(value.shape, dtype=torch.float64, generator=generator)
            return random[value]

        before = self._values(Replay({}, partial(otherwise, old), self.operations), folded=False)
        replay = Replay({}, partial(otherwise, new), self.operations, added)
        for value in self.silenced:
            replay[value] = torch.zeros(value.shape, dtype=torch.float64)
        after = self._values(replay, folded=True)
        return max(
            ((one - two).abs().max() / two.abs().max().clamp(min=1e-30)).nan_to_num(torch.inf).item()
            for one, two in zip(after, before, strict=True)
        )

    def _values(self, replay: Replay, folded: bool) -> list[Tensor]:
        layer = self.normalization
        if layer is not None:
            value = replay[layer.value]
            made = layer.affine(value) if not folded else value if self.passes else torch.zeros_like(value)
            if layer.output is not None:
                replay[layer.output] = made
            if not self.targets:
                return [made]
        return [replay[target] for target in self.targets]


Added = dict[Operation, Callable[[Tensor], Tensor]]  # what a new bias adds to an operation's result


@dataclass(frozen=True, eq=False)
class Plan:
    """How one layer is folded.

    path: of the layer, or of a convolution that another one takes over.
    outcome, what: for its report.
    into: the paths of the modules whose parameters take it over.
    values: the new value of each parameter, or buffer, by name, float64; of a bias that there was not, too.
    modules: what takes a module's place, by path.
    checks: one for each call.
    added: of the new biases.
    touched: names of all parameters that it reads or changes.
    borders: the taps of convolutions that get a map (border.py), by path.
    """

    path: str
    outcome: Outcome
    what: str
    into: tuple[str, ...] = ()
    values: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    added: Added = field(default_factory=dict)
    touched: frozenset[str] = frozenset()
    borders: dict[str, Tensor] = field(default_factory=dict)

    def error(self, tensor: Tensors) -> float:
        """How far its checks are from what they must be."""

        def new(value: Value) -> Tensor:
            return self.values[value.name] if value.name in self.values else tensor(value)

        return max((check.error(tensor, new, self.added) for check in self.checks), default=0.0)

    def apply(self, model: nn.Module, in_place: bool = True) -> None:
        """Change the model.

        in_place: whether parameters are changed; else they are replaced, as another model has the same ones.
        """
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, new in self.values.items():
                if name in tensors:
                    if in_place:
                        tensors[name].copy_(new)
                    else:
                        _replace(model, tensors[name], new)
                    continue
                home, _, own = name.rpartition(".")
                module = model.get_submodule(home)
                like = next(module.parameters())
                setattr(module, own, nn.Parameter(new.to(like), requires_grad=like.requires_grad))
        for path, taps in self.borders.items():
            make_bordered(model.get_submodule(path), taps)
        for path, module in self.modules.items():
            for each in list(paths(model, path)):
                parent, _, name = each.rpartition(".")
                setattr(model.get_submodule(parent), name, module)


def _replace(model: nn.Module, old: Tensor, new: Tensor) -> None:
    new = new.to(old)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is old:
                    table[name] = new  # type: ignore[assignment]


def _kept_in_lists(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that are in plain lists, tuples or dictionaries of modules, and where."""
    found: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_") or isinstance(value, Fused) or not isinstance(value, list | tuple | dict):
                continue
            for each in value.values() if isinstance(value, dict) else value:
                if isinstance(each, nn.Module):
                    found[each] = f"{path}.{name}".lstrip(".")
    return found


def own_origin(call: ModuleCall, value: Value, tensors: Tensors, normalizations: bool = False) -> Origin:
    """What makes up the input of a layer's call, if nobody else sees that change. Raises: Left, NotLinear."""
    inside = set(call.operations)
    if value.is_output or any(user not in inside for user in value.users):
        raise Left("its input is read elsewhere too")
    origin = sources(value, tensors, normalizations=normalizations)
    tensors.check_changed([value, *(result for each in origin.operations for result in each.results)])
    return origin


def paths(model: nn.Module, path: str) -> Iterator[str]:
    """All paths of the module at `path`."""
    module = model.get_submodule(path)
    yield from (name for name, each in model.named_modules(remove_duplicate=False) if each is module)


class Wanted:
    """What is wanted of parameters: wishes must agree, and nothing else may read what is changed."""

    def __init__(self, model: nn.Module, tensor: Tensors) -> None:
        self.model, self.tensor = model, tensor
        self.values: dict[str, Tensor] = {}
        self.added: Added = {}
        self.into: dict[str, None] = {}
        self._readers: dict[Value, set[Operation]] = defaultdict(set)

    def home(self, linear: Linear) -> str:
        """The path of the module whose parameter the weight is. Raises: Left if it has hooks."""
        path = linear.home
        if has_hooks(self.model.get_submodule(path)):
            raise Left(f"{path} has hooks, which see its output")
        return path

    def want(self, value: Value, new: Tensor, readers: Iterable[Operation]) -> None:
        """A parameter, which these operations read, is to be `new`. Raises: Left."""
        self._readers[value] |= set(readers)
        before = self.values.setdefault(value.name, new)
        if before is not new and not torch.equal(before, new):
            raise Left(f"{value.name} is used twice, by layers that want it different")

    def want_bias(
        self, linear: Linear, more: Tensor, factor: Tensor | None = None, needed: bool | None = None
    ) -> None:
        """The bias, or a new one, times `factor` is to be larger by `more`, (outputs,). Raises: Left.

        needed: whether there must be one; None: if `more` is not 0.
        """
        if linear.bias is not None:
            old = self.tensor(linear.bias)
            self.want(linear.bias, (old if factor is None else old * factor) + more, [linear.operation])
        elif bool(more.any()) if needed is None else needed:
            if not self.may_have_bias(linear):
                raise Left(f"{self.home(linear) or 'the operation beside it'} has no place for a bias")
            name = f"{self.home(linear)}.bias".lstrip(".")
            before = self.values.setdefault(name, more)
            if before is not more and not torch.equal(before, more):
                raise Left(f"{name} is used twice, by layers that want it different")
            view = [
                -1 if at == linear.output_dim else 1 for at in range(len(linear.operation.results[0].shape))
            ]
            self.added[linear.operation] = lambda y: y + more.view(view)

    def add_map(self, linear: Linear, taps: Tensor) -> None:
        """The operation's result gets a map of these taps, (outputs, 1, *kernel)."""
        strides, paddings, dilations = linear.steps
        sizes = linear.input.shape[2:]
        self.added[linear.operation] = lambda y: y + map_of(taps, sizes, strides, paddings, dilations)

    def may_have_bias(self, linear: Linear) -> bool:
        """Whether the module whose weight it is has a place for a bias that its forward reads."""
        module, call = self.model.get_submodule(self.home(linear)), linear.operation.call
        return linear.bias is not None or (
            call is not None
            and call.module is module
            and isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            and module._parameters.get("bias", module) is None
            and not is_patched(module)
        )

    def _check(self) -> None:
        """Raise Left if something else reads what is to be changed."""
        for value, readers in self._readers.items():
            users = {_behind_turn(user) for user in value.users}
            if not users <= {_behind_turn(reader) for reader in readers}:
                raise Left(f"{value.name} is read by others too")

    def plan(
        self, path: str, instead: nn.Module, checks: list[Check], borders: dict[str, Tensor] | None = None
    ) -> Plan:
        """All this as the plan by which `instead` takes the place of the module at `path`. Raises: Left."""
        self._check()
        return Plan(
            path,
            "folded",
            "into " + ", ".join(each or "the model itself" for each in self.into),
            tuple(self.into),
            self.values,
            {path: instead},
            checks,
            self.added,
            own_names(self.model, path) | set(self.values),
            borders or {},
        )


def by_channel(values: Tensor, channels: Tensor, otherwise: float) -> Tensor:
    """`values[channels]`, and `otherwise` where the channel is -1."""
    return torch.where(channels >= 0, values[channels.clamp(min=0)], otherwise)


def inverse(channels: Tensor, number: int) -> Tensor:
    """For each of so many channels the place at which it is among `channels`, or -1."""
    found = torch.full((number,), -1)
    found[channels[channels >= 0]] = (channels >= 0).nonzero().flatten()
    return found


def own_names(model: nn.Module, path: str) -> frozenset[str]:
    """The names of the parameters of the module at `path`."""
    prefix = f"{path}." if path else ""
    return frozenset(prefix + name for name, _ in model.get_submodule(path).named_parameters())


def _behind_turn(operation: Operation) -> Operation:
    """The operation that reads the transposed weight, for the transposition of one."""
    if operation.name == "aten.t" and len(operation.results[0].users) == 1:
        return operation.results[0].users[0]
    return operation
