"""What is before each layer, as one run of the model shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from batchnorm.diagnostics.runs import Runs
from batchnorm.graph.modules import is_norm
from batchnorm.graph.nonlinearity import DROPOUT, NONLINEAR, PASSED, PRODUCTS, RESPONSE, SCALES
from batchnorm.graph.observation import (
    BATCH_NORM,
    LAYOUT,
    ModuleCall,
    Observation,
    Operation,
    Value,
    observe_run,
)

_BERNOULLI = frozenset({"aten.bernoulli", "aten.bernoulli_"})
_CUT_OFF = {"relu": 0.0, "hardtanh": 0.0, "hardswish": -3.0, "hardsigmoid": -3.0, "gelu": -6.0, "silu": -15.0}
_ROWS = ("DropPath", "StochasticDepth", "DropBlock2d")
_BETWEEN = LAYOUT | {"aten.cat"}  # nothing is added, pooled or padded
_OTHER_NORMS = frozenset(
    f"aten.{name}" for name in ("native_group_norm", "native_layer_norm", "_fused_rms_norm", "rms_norm")
)


@dataclass(frozen=True)
class Dropped:
    """Dropout on the way to a layer.

    path: of the module that drops; of the one that calls the function.
    p: the probability.
    """

    path: str
    p: float


@dataclass
class Before:
    """What a call of a layer gets, followed back to what has made it.

    linear: operations Wx + b behind it, through whatever only arranges, pools, adds or scales.
    norms: paths of layers of batch normalization likewise.
    alone: whether nobody else reads what is in between.
    directly: whether nothing is between it and all of these but layout changes, concatenation and dropout.
    nonlinear: names of functions likewise, "relu".
    given: whether an input of the model comes to it likewise.
    dropped: dropout in between.
    dropped_before: dropout before the linear operations.
    """

    linear: list[Operation] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    nonlinear: list[str] = field(default_factory=list)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    dropped_before: dict[str, Dropped] = field(default_factory=dict)
    given: bool = False
    directly: bool = True
    alone: bool = True


@dataclass
class Structure:
    """One run of the model.

    seen: what was observed.
    training: whether the model was in training mode.
    """

    seen: Observation
    training: bool
    prefix: str

    def __post_init__(self) -> None:
        self._module_of: dict[Value, tuple[ModuleCall, Value]] = {}
        self._norms: dict[Operation, str] = {}
        for call in self.seen.calls:
            if isinstance(call.module, DROPOUT) or type(call.module).__name__ in _ROWS:
                for value in call.returns:
                    if call.given and value is not call.given[0]:
                        self._module_of[value] = call, call.given[0]
            if is_norm(call.module) and not call.module._modules.keys() - {"act", "drop"}:
                for operation in call.operations:
                    self._norms.setdefault(operation, self.path(call.path))
        self._idle = {
            call.given[0]: call
            for call in self.seen.calls
            if isinstance(call.module, DROPOUT) and call.given and call.given[0] in call.returns
        }

    def path(self, path: str) -> str:
        return ".".join(filter(None, (self.prefix, path)))

    def calls_of(self, layer: nn.Module) -> list[ModuleCall]:
        return self.seen.calls_of(layer)

    def before(self, call: ModuleCall) -> Before:
        """What is before a call of a layer."""
        found = Before()
        value = (call.given or call.reads)[0]
        for ended, direct in self._back(value, found, through=PASSED | SCALES):
            self._end(ended, direct, found)
        for operation in found.linear:
            deeper = Before()
            for each in operation.reads:
                if each.kind != "parameter":
                    list(self._back(each, deeper, through=PASSED | SCALES | NONLINEAR))
            found.dropped_before |= deeper.dropped
        return found

    def _end(self, value: Value, direct: bool, found: Before) -> None:
        made = value.producer
        found.directly &= direct
        if made is None:
            found.given |= value.kind == "input"
        elif made in self._norms:
            if made.name in BATCH_NORM or made.name in _OTHER_NORMS or self._norms[made]:
                found.norms.append(self._norms[made])
        elif made.name in PRODUCTS:
            found.linear.append(made)
        elif made.name in NONLINEAR:
            found.nonlinear.append(made.name.removeprefix("aten.").strip("_").removesuffix("_default"))

    def _back(self, value: Value, found: Before, through: frozenset[str]) -> Iterator[tuple[Value, bool]]:
        """The values at which the way back ends, and whether nothing but layout changes was passed until there."""
        waiting, seen = [(value, True)], set()
        while waiting:
            each, direct = waiting.pop()
            if each in seen:
                continue
            seen.add(each)
            found.alone &= len(each.users) < 2 and not each.is_output
            if each in self._idle:
                self._drop(self._idle[each], found)
            if each in self._module_of:
                call, given = self._module_of[each]
                self._drop(call, found)
                waiting.append((given, direct))
                continue
            made = each.producer
            noise = _noise(made) if made is not None else None
            if made is None or made in self._norms:
                yield each, direct
            elif noise is not None:
                where = self.path(made.call.path) if made.call else ""
                found.dropped[where] = Dropped(where, noise[1])
                waiting.append((noise[0], direct))
            elif made.name in through:
                further = direct and made.name in _BETWEEN
                operands = [value for value in made.reads if value.kind in ("input", "result")]
                waiting += [(value, further) for value in operands]
            else:
                yield each, direct

    def _drop(self, call: ModuleCall, found: Before) -> None:
        p = getattr(call.module, "p", getattr(call.module, "drop_prob", 0.0)) or 0.0
        if p > 0 and isinstance(call.module, DROPOUT):
            path = self.path(call.path)
            found.dropped[path] = Dropped(path, float(p))

    def cut_off(self, layer: nn.Module) -> float | None:
        """Below what the activation behind a layer is constant; None where it never is, or none follows."""
        own = {"relu": 0.0, "relu6": 0.0, "silu": _CUT_OFF["silu"]}.get(
            str(getattr(layer, "activation", None))
        )
        if own is not None:
            return own
        made = [
            operation.results[0]
            for call in self.calls_of(layer)
            for operation in call.operations
            if operation.name in BATCH_NORM and operation.results
        ]
        if not made or any(value.is_output or not value.users for value in made):
            return None
        found = [
            _CUT_OFF.get(user.name.removeprefix("aten.").removesuffix("_"))
            for each in made
            for user in each.users
        ]
        known = [each for each in found if each is not None]
        return min(known) if len(known) == len(found) else None

    @property
    def responses(self) -> list[str]:
        """The paths of local response normalization, of those that call the function too."""
        modules = [call.path for call in self.seen.calls if isinstance(call.module, RESPONSE)]
        functions = [each.call.path if each.call else "" for each in self.seen.operations if _responds(each)]
        return [self.path(path) for path in dict.fromkeys([*modules, *functions])]

    @property
    def dropouts(self) -> list[Dropped]:
        """Dropout modules that are called, with their probability."""
        found: dict[str, Dropped] = {}
        for call in self.seen.calls:
            if isinstance(call.module, DROPOUT) and call.module.p > 0:
                found[call.path] = Dropped(self.path(call.path), call.module.p)
        return list(found.values())


def structure(runs: Runs) -> Structure | str:
    """What one run shows, in training mode if the model runs in it; or why there was none."""
    try:
        example = runs.example()
    except ValueError as why:
        return str(why)
    error: Exception | None = None
    for training in (True, False):
        try:
            with runs.unharmed():
                runs.model.train(training)
                seen = observe_run(runs.model, lambda: runs.call(example), example)
        except torch.OutOfMemoryError:
            raise
        except Exception as why:
            error = error or why
            continue
        return Structure(seen, training, runs.prefix)
    return f"the model does not run on a small batch: {type(error).__name__}: {error}".splitlines()[0]


def _noise(made: Operation) -> tuple[Value, float] | None:
    """What an operation of dropout drops of, and the probability; None for another one."""
    if made.name == "aten.native_dropout":
        return made.reads[0], float(made.arguments[1])
    if made.name not in ("aten.mul", "aten.mul_") or len(made.reads) != 2:
        return None
    for value, other in (made.reads, made.reads[::-1]):
        drawn = other.producer
        while drawn is not None and drawn.name in SCALES and len(drawn.reads) == 1:
            drawn = drawn.reads[0].producer
        if drawn is not None and drawn.name in _BERNOULLI:
            kept = drawn.arguments[1] if len(drawn.arguments) > 1 else 0.5
            return value, 1.0 - float(kept) if isinstance(kept, float) else 0.5
    return None


def _responds(made: Operation) -> bool:
    """Whether it is the division of local response normalization: by a power of a sum over neighbouring channels."""
    if made.name != "aten.div" or len(made.reads) != 2:
        return False
    step = made.reads[1].producer
    for name in ("aten.pow", "aten.add", "aten.mul"):
        if step is None or step.name != name:
            return False
        step = step.reads[0].producer
    while step is not None and step.name in LAYOUT:
        step = step.reads[0].producer
    return step is not None and step.name.startswith("aten.avg_pool")
