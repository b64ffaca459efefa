"""Where normalization can be put: the linear operations Wu + b whose outputs come to a nonlinearity.

    for place in places(observe(model, images)):
        place.path, place.why                      # "features.0", "" or the reason why none can be put there

What is between the two may arrange, pool, pad, enlarge, scale, add or drop; so of a sum, relu(conv(x) + skip), it is
the convolution that is found, where residual networks have their normalization.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from batchnorm.graph.modules import is_norm
from batchnorm.graph.observation import BATCH_NORM, LAYOUT, REREAD, ModuleCall, Observation, Operation, Value
from batchnorm.graph.sources import SUMS


def _aten(names: str) -> frozenset[str]:
    found = names.split()
    return frozenset(f"aten.{name}" for name in (*found, *(f"{name}_" for name in found)))


NONLINEAR = _aten(
    "relu leaky_relu relu6 elu selu celu gelu silu mish hardswish hardtanh hardsigmoid sigmoid tanh _prelu_kernel "
    "prelu rrelu rrelu_with_noise softplus softshrink hardshrink threshold clamp clamp_min log_sigmoid_forward glu "
    "sin cos atan erf abs maximum minimum where masked_fill"
)
_BOUNDS = _aten("clamp")  # of an image's range, say, behind a nonlinearity
_NORMS = BATCH_NORM | _aten("native_group_norm native_layer_norm _fused_rms_norm rms_norm")
PRODUCTS = {
    "aten.convolution": 0,
    "aten.linear": 0,
    "aten.addmm": 1,
    "aten.mm": 0,
    "aten.bmm": 0,
    "aten.baddbmm": 1,
}
_MOVES = _aten("permute transpose t view reshape _unsafe_view _reshape_alias unsqueeze squeeze select unbind")
_TURNS = _aten("permute transpose t")
SCALES = _aten("mul div")
PASSED = (
    LAYOUT
    | SUMS
    | _aten(
        "cat stack roll flip sum repeat gather scatter scatter_add index_add index index_select constant_pad_nd "
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
        "native_dropout mean amax avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d "
        "_adaptive_avg_pool3d max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
        "upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa pixel_shuffle pixel_unshuffle channel_shuffle "
        "native_channel_shuffle _to_copy copy neg"
    )
    | {REREAD}
)
# Their values do not depend on those of what they are called with.
_MAKES_NEW = _aten(
    "empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros new_ones new_full "
    "new_empty_strided bernoulli"
)
DROPOUT = nn.modules.dropout._DropoutNd
RESPONSE = (nn.LocalResponseNorm, nn.CrossMapLRN2d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_SOFTMAX = _aten("_softmax _safe_softmax") | {
    f"aten._scaled_dot_product_{name}"
    for name in (
        "flash_attention_for_cpu",
        "attention_math",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
}
_RANDOM = frozenset({"aten.randn", "aten.normal", "aten.randint"})  # noise that a generator begins with


@dataclass(frozen=True, eq=False)
class Place:
    """A linear operation, and where its output can be normalised.

    path: of the module whose output, or whose input, is what is to be normalised; of the one that calls the operation
        where there is none.
    of_input: whether it is the input, of an activation.
    dim: in which its channels are, 1 or -1.
    value: it, as it was seen.
    why: why it is none; "" if it is one.
    forced: whether one who names it may have it all the same.
    bias: the name of the parameter whose only use is to be added to it as it is; None if there is none.
    nonlinearity: the path of the module of the first nonlinearity that follows, None where a function is called.
    """

    path: str
    of_input: bool = False
    dim: int = 1
    value: Value | None = None
    why: str = ""
    forced: bool = False
    bias: str | None = None
    nonlinearity: str | None = None


def places(seen: Observation) -> list[Place]:
    """One for each module that was seen to compute a linear operation of its parameters, in the order of the calls."""
    return _Places(seen).found()


def recurrent(model: nn.Module) -> dict[str, nn.Module]:
    """The recurrent cells and layers of a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, RECURRENT)}


class _Places:
    def __init__(self, seen: Observation) -> None:
        self._seen = seen
        self._data = _dependent(seen)
        read = {value for operation in seen.operations for value in operation.reads}
        self._learned = _reached(seen, {each for each in read if each.kind == "parameter"})
        self._linear = [each for each in seen.operations if self._is_linear(each)]
        self._products = set(self._linear)
        self._normed = {value: path for path, value in self._normalized()}
        self._dropped = {
            value: call.given[0]
            for call in seen.calls
            if isinstance(call.module, (DROPOUT, *RESPONSE)) and call.given
            for value in call.returns
        }
        self._modules = set(seen.model.modules())
        self._numbers: dict[nn.Module, int] = {}
        for call in seen.calls:
            self._numbers[call.module] = self._numbers.get(call.module, 0) + 1
        self._attention = self._weighing()
        self._heads = self._ends()
        self._before: dict[Operation, list[Operation]] = {}  # the nonlinearities that each comes to
        for operation in seen.operations:
            if self._is_nonlinear(operation):
                for linear in self._behind(operation):
                    self._before.setdefault(linear, []).append(operation)
        self._read_by_norm = {
            value: call.path or "the model"
            for call in seen.calls
            if is_norm(call.module)
            for value in call.given
        }

    def _is_nonlinear(self, operation: Operation) -> bool:
        data = [each for each in operation.reads if each in self._data]
        if operation.name in NONLINEAR:
            return bool(data)
        # x · (x > 0), by hand
        return operation.name in SCALES and len(data) > 1 and any(each.dtype is torch.bool for each in data)

    def found(self) -> list[Place]:
        by_path: dict[str, Place] = {}
        for linear in self._linear:
            place = replace(self._place(linear), nonlinearity=self._follower(linear))
            known = by_path.get(place.path)
            if known is None or (known.why == "" and place.why):
                by_path[place.path] = place
        return list(by_path.values())

    def _place(self, linear: Operation) -> Place:
        home = linear.call.path if linear.call else ""
        for call in _callers(linear.call):
            if isinstance(call.module, RECURRENT):
                return Place(call.path, why=f"is recurrent ({type(call.module).__name__})")
            if isinstance(call.module, nn.TransformerEncoderLayer):
                why = "whose fast path reads its weight and does not call it"
                return Place(
                    home, why=f"is part of {call.path or 'the model'}, a {type(call.module).__name__}, {why}"
                )
            if _is_attention(call):
                part = "" if call.path == home else f"is part of {call.path}, "
                return Place(home, why=f"{part}{type(call.module).__name__}", forced=True)
        norm = self._norm_after(linear)
        if norm is not None:
            return Place(home, why=f"is normalised already, by {norm}")
        if linear in self._attention:
            return Place(home, why="makes weights of whole channels or positions (attention)", forced=True)
        if linear in self._heads:
            return self._attached(linear, Place(home, why="makes an output of the model", forced=True))
        if linear not in self._before:
            return self._attached(
                linear, Place(home, why="no nonlinearity that is known follows", forced=True)
            )
        return self._attached(linear, Place(home))

    def _bias(self, linear: Operation, made: Value) -> str | None:
        """The bias that is added to `made` as it is, and read by nobody else."""
        bias = bias_of(linear)
        if bias is None or bias.kind != "parameter" or bias.users != [linear]:
            return None
        while made.producer is not linear:
            operation = made.producer
            if operation is None or operation.name not in LAYOUT or len(operation.reads) != 1:
                return None
            made = operation.reads[0]
        return bias.name

    def _follower(self, linear: Operation) -> str | None:
        call = self._first_nonlinearity(linear)
        return call.path if call is not None and not call.module._modules else None

    def _first_nonlinearity(self, linear: Operation) -> ModuleCall | None:
        """The call in which the first nonlinearity after it happens."""
        return self._before[linear][0].call if linear in self._before else None

    def _attached(self, linear: Operation, place: Place) -> Place:
        """The place with the module at which it is."""
        call = linear.call
        if call is not None and call.returns_tensor and call.module in self._modules:
            value = call.returns[0]
            dim = self._dim(value, linear, call)
            if dim is not None:
                found = replace(place, path=call.path, dim=dim, value=value, bias=self._bias(linear, value))
                return self._once(call, found)
        activation = self._first_nonlinearity(linear)
        if activation is not None and self._takes_one(activation):
            dim = self._dim(activation.given[0], linear, None)
            if dim is not None:
                found = replace(
                    place, path=activation.path, of_input=True, dim=dim, value=activation.given[0]
                )
                return self._once(activation, found)
        return Place(
            place.path,
            why=place.why
            or f"its forward calls {linear.name.removeprefix('aten.')} itself, and no module returns what it makes",
        )

    def _takes_one(self, call: ModuleCall) -> bool:
        """Whether it is the call of a module of the model without children, with one tensor."""
        own = call.module in self._modules and not call.module._modules
        return own and call.takes_tensor and len(call.given) == 1

    def _once(self, call: ModuleCall, place: Place) -> Place:
        number = self._numbers[call.module]
        if number > 1:
            why = f"is called {number} times, and the moments of each call are others"
            return Place(place.path, why=place.why or why)
        if place.value is not None and len(place.value.shape) < 2:
            return Place(place.path, why=place.why or "makes one sample, without a dimension of the batch")
        return place

    def _dim(self, value: Value, linear: Operation, call: ModuleCall | None) -> int | None:
        """The dimension of the channels in a value that comes from `linear` alone; None if it is not known."""
        made, moved = value, False
        while made.producer is not linear:
            operation = made.producer
            if operation is None or operation.name not in PASSED | SCALES:
                return None
            before = [each for each in operation.reads if each in self._data]
            if len(before) != 1:
                return None
            if _is_read_twice(before[0], call):
                return None
            if operation.name in _TURNS and linear.name != "aten.convolution":
                return None
            moved |= operation.name in _MOVES
            made = before[0]
        if _is_read_twice(made, call):
            return None
        if linear.name == "aten.convolution":
            same = len(value.shape) == len(made.shape) and value.shape[1] == made.shape[1]
            return 1 if same and not moved else None
        if linear.name in ("aten.bmm", "aten.baddbmm"):
            return None
        return -1 if value.shape[-1] == made.shape[-1] else None

    def _behind(self, nonlinear: Operation) -> Iterator[Operation]:
        """The linear operations whose outputs come to a nonlinearity."""
        waiting = [each for each in nonlinear.reads if each in self._data]
        seen: set[Value] = set()
        while waiting:
            value = waiting.pop()
            made = value.producer
            if value in seen or made is None or value in self._normed:
                continue
            seen.add(value)
            if value in self._dropped:
                waiting.append(self._dropped[value])
            elif made in self._products:
                yield made
            elif self._passes(made):
                waiting += [each for each in made.reads if each in self._data]
            elif made.name in SCALES:  # by the weights of an attention, perhaps
                weighed = [each for each in made.reads if each.producer not in self._attention]
                waiting += weighed if len(weighed) < len(made.reads) else []

    def _passes(self, operation: Operation) -> bool:
        if operation.name in PASSED:
            return True
        # by a number, a parameter, or a matrix that nobody has learned, as of a graph
        of_one = operation.name in SCALES or (operation.name in PRODUCTS and operation not in self._products)
        return of_one and sum(each in self._data for each in operation.reads) == 1

    def _norm_after(self, linear: Operation) -> str | None:
        """The path of a normalization layer that reads what the operation makes, and nothing else in it does."""
        nonlinear = self._before.get(linear, [])
        waiting, seen = list(linear.results), set()
        found = None
        while waiting:
            value = waiting.pop()
            if value in self._read_by_norm:
                found = self._read_by_norm[value]
                continue
            if value in seen:
                continue
            seen.add(value)
            for user in value.users:
                if user.name in _NORMS:
                    found = found or (user.call.path if user.call else "") or user.name
                elif user in nonlinear:
                    return None
                elif self._passes(user) and user.name not in SUMS:
                    waiting += user.results
        return found

    def _normalized(self) -> Iterator[tuple[str, Value]]:
        for call in self._seen.calls:
            if is_norm(call.module):
                yield from ((call.path, value) for value in call.returns)
        for operation in self._seen.operations:
            if operation.name in _NORMS and operation.results:
                yield operation.call.path if operation.call else operation.name, operation.results[0]

    def _is_linear(self, operation: Operation) -> bool:
        """Whether it multiplies what comes from the inputs by what comes from parameters."""
        first = PRODUCTS.get(operation.name)
        if first is None:
            return False
        factors = operation.arguments[first : first + 2]
        others = [each for each in factors if each not in self._data]
        return len(others) == 1 and others[0] in self._learned

    def _weighing(self) -> set[Operation]:
        """The operations whose results only weigh others: one weight for a whole channel, position or row."""
        found: set[Operation] = set()
        for operation in reversed(self._seen.operations):
            uses = [(value, user) for value in operation.results for user in value.users]
            returned = any(value.is_output for value in operation.results)
            if uses and not returned and all(u in found or self._weighs(v, u, operation) for v, u in uses):
                found.add(operation)
        return found

    def _weighs(self, value: Value, user: Operation, made: Operation) -> bool:
        """Whether an operation multiplies something larger by this value, or anything by a softmax."""
        others = [each for each in user.reads if each in self._data and each is not value]
        if not others or value not in self._data:
            return False
        if user.name in SCALES:
            return max(_own_size(each) for each in others) > _own_size(value) or self._is_softmax(made)
        return user.name in PRODUCTS and self._is_softmax(made)

    def _is_softmax(self, operation: Operation | None) -> bool:
        while operation is not None and operation.name in LAYOUT | {"aten.native_dropout", "aten._to_copy"}:
            operation = operation.reads[0].producer
        return operation is not None and operation.name in _SOFTMAX

    def _ends(self) -> set[Operation]:
        """The linear operations whose outputs the model returns, with one nonlinearity or none in between."""
        found: set[Operation] = set()
        waiting = [(value, 0) for value in self._seen.outputs]
        seen: set[tuple[Value, int]] = set()
        while waiting:
            value, passed = waiting.pop()
            made = value.producer
            if (value, passed) in seen or made is None or value in self._normed:
                continue
            seen.add((value, passed))
            if made in self._products:
                found.add(made)
                continue
            bounds = made.name in _BOUNDS and None not in (made.argument("min"), made.argument("max"))
            passed += self._is_nonlinear(made) and not bounds
            if passed <= 1:
                waiting += [(each, passed) for each in made.reads if each in self._data]
        return found


def _dependent(seen: Observation) -> set[Value]:
    """The values that depend on the inputs, or on noise that the model begins with."""
    noise = {value for each in seen.operations if each.name in _RANDOM for value in each.results}
    return _reached(seen, {*seen.inputs, *noise})


def _reached(seen: Observation, values: set[Value]) -> set[Value]:
    """These values, and all that are made from them."""
    found = set(values)
    for operation in seen.operations:
        if operation.name not in _MAKES_NEW and any(each in found for each in operation.reads):
            found.update(operation.results)
    return found


def _is_read_twice(value: Value, call: ModuleCall | None) -> bool:
    """Whether several operations of a call read a value."""
    return call is not None and sum(each in call.operations for each in value.users) > 1


def _own_size(value: Value) -> int:
    """The number of elements that a value has before it is expanded."""
    while (made := value.producer) is not None and made.name in ("aten.expand", "aten.repeat"):
        value = made.reads[0]
    return value.shape.numel()


def bias_of(linear: Operation) -> Value | None:
    place = {"aten.convolution": 2, "aten.linear": 2, "aten.addmm": 0}.get(linear.name)
    if place is None or place >= len(linear.arguments) or linear.keywords:
        return None
    found = linear.arguments[place]
    return found if isinstance(found, Value) else None


def is_named_attention(module: nn.Module) -> bool:
    """Whether its class is called attention."""
    return any(word in type(module).__name__ for word in ("Attention", "Attn"))


def _is_attention(call: ModuleCall) -> bool:
    """By its class, or by a name with a softmax inside; a whole network may have the name too."""
    if isinstance(call.module, nn.MultiheadAttention):
        return True
    named = is_named_attention(call.module)
    return named and call.caller is not None and any(each.name in _SOFTMAX for each in call.operations)


def _callers(call: ModuleCall | None) -> Iterator[ModuleCall]:
    while call is not None:
        yield call
        call = call.caller
