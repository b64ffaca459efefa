"""The linear operations that a value comes from, and which of their channels come to which of its channels.

    found = sources(norm.reads[0], tensor)     # of conv → reshape → concat → BN: each convolution, with its channels

Between may be whatever keeps a factor and a term of a channel what they are: layout changes, concatenation, sums,
average pooling, multiplication by parameters and numbers. Where the channels go is not derived from the arguments of
those operations but seen: they are called again on codes, one number for each channel of one source and 0 for the
others, and what arrives in a channel must be one code, times one number, everywhere. So reshapes, splits, shuffles and
whatever else arranges values need no rules of their own.

`readers` is the same in the other direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.graph.linear import Linear
from batchnorm.graph.observation import LAYOUT, Operation, Value
from batchnorm.graph.replay import Replay, zeros

GetTensor = Callable[[Value], Tensor]  # of a parameter or buffer, float64

SUMS = frozenset({"aten.add", "aten.add_", "aten.sub", "aten.sub_", "aten.rsub"})
_FACTORS = frozenset({"aten.mul", "aten.mul_", "aten.div", "aten.div_", "aten.neg", "aten.neg_"})
_POOLS = frozenset(
    {
        "aten.mean",
        "aten.avg_pool1d",
        "aten.avg_pool2d",
        "aten.avg_pool3d",
        "aten._adaptive_avg_pool2d",
        "aten._adaptive_avg_pool3d",
        "aten.adaptive_avg_pool1d",
    }
)
_ARRANGED = LAYOUT | _POOLS | {"aten.cat"}
_PASSED = _ARRANGED | SUMS | _FACTORS
_CLOSE = 1e-9


class NotLinear(Exception):
    """A value does not come from linear operations alone, or go into them; the message says what is in between."""


@dataclass(frozen=True, eq=False)
class Source:
    """A linear operation, and where its channels go.

    channels: (outputs,) int64, the channel of the value to which each comes; -1 for those that do not.
    factors: (outputs,) by what each is multiplied on its way: -1 where it is subtracted; 1 where it does not come.
    """

    linear: Linear
    channels: Tensor
    factors: Tensor


@dataclass(frozen=True, eq=False)
class Term:
    """A parameter or buffer that is added: a bias beside a matrix product, an embedding of positions.

    channels: of its shape, int64, the channel of the value to which each element comes; -1 for those that do not.
    factors: of its shape, by what each is multiplied on its way.
    everywhere: (channels of the value,) whether each position of the channel has one of its elements.
    """

    value: Value
    channels: Tensor
    factors: Tensor
    everywhere: Tensor


@dataclass(frozen=True, eq=False)
class Skip:
    """A value that is added as it is, beside a linear operation that reads it too.

    channels: (its channels,) int64, the channel to which each comes; -1 for those that do not.
    factors: (its channels,) by what each is multiplied on its way.
    """

    value: Value
    channels: Tensor
    factors: Tensor


@dataclass(frozen=True, eq=False)
class Origin:
    """All that makes up a value, (N, C, ...): the sum of these and of `constant`, (C,), numbers that are added.

    operations: the sources, and all between them and the value.
    """

    sources: list[Source]
    terms: list[Term]
    skips: list[Skip]
    constant: Tensor
    operations: set[Operation]
    way: _Way

    def aligned(self, one: Source | Skip, other: Source | Skip) -> bool:
        """Whether each position of one comes to where the same position of the other comes to."""
        return self.way.aligned(_made(one), _made(other))


def _made(part: Source | Skip) -> tuple[Value, int]:
    """What it is that comes, and the dimension of its channels."""
    if isinstance(part, Skip):
        return part.value, 1
    return part.linear.operation.results[0], part.linear.output_dim


def sources(
    value: Value, tensor: GetTensor, stops: frozenset[Value] = frozenset(), normalizations: bool = False
) -> Origin:
    """The linear operations whose outputs make up `value`, (N, C, ...), and what is added to them.

    Each channel of the value comes from one channel of at least one of them, of a sum from one of each; nothing else
    reads what is in between.

    Args:
        value: of which it is asked.
        tensor: gives what a parameter or buffer is.
        stops: values that are looked at as skips, whatever makes them.
        normalizations: whether one counts as a linear operation.

    Raises: NotLinear.
    """
    way = _Way.to(value, tensor, stops, normalizations)
    found = []
    reached = torch.zeros(value.shape[1], dtype=torch.bool)
    for linear in way.leaves:
        channels, factors = way.channels_of(linear.operation.results[0], linear.output_dim)
        reached[channels[channels >= 0]] = True
        found.append(Source(linear, channels, factors))
    if not bool(reached.all()):
        raise NotLinear("some channels do not come from a linear operation")
    terms = [Term(each, *way.elements_of(each)) for each in way.terms]
    skips = [Skip(each, *way.channels_of(each, 1)) for each in way.skips]
    operations = way.between.union(way.constants, *(linear.operations for linear in way.leaves))
    return Origin(found, terms, skips, way.constant(), operations, way)


class _Way:
    """All between a value and the linear operations, `leaves`, the `terms` and the `skips` that it comes from."""

    def __init__(
        self, value: Value, tensor: GetTensor, stops: frozenset[Value], normalizations: bool
    ) -> None:
        self.value = value
        self.tensor = tensor
        self.between: set[Operation] = set()
        self.leaves: list[Linear] = []
        self.terms: dict[Value, None] = {}
        self.skips: dict[Value, str] = {}  # and why they are none of the others
        self.parts: list[Value] = []  # of splits, which others read
        self._zero: Tensor | None = None
        seen: set[Operation] = set()
        waiting = [value]
        while waiting:
            each = waiting.pop()
            made = each.producer
            if each in stops:
                self.skips[each] = ""
            elif each.is_output and each is not value:
                raise NotLinear("the model returns what is in between")
            elif each.kind in ("parameter", "buffer"):
                self.terms[each] = None
            elif made is None:
                self.skips[each] = f"it comes from the {each.kind}"
            elif made in seen:
                continue
            elif (linear := Linear.of(made)) is not None and (normalizations or not linear.is_normalization):
                seen.add(made)
                self.leaves.append(linear)
            elif made.name not in _PASSED:
                self.skips[each] = f"it comes from {made.name}"
            elif not _weighs_alike(made):
                raise NotLinear("it is pooled over windows of different sizes")
            else:
                seen.add(made)
                self.between.add(made)
                waiting += self._operands(made)

    @classmethod
    def to(cls, value: Value, tensor: GetTensor, stops: frozenset[Value], normalizations: bool) -> _Way:
        """The way, with those values for skips that are read elsewhere too, if a leaf reads them."""
        while True:
            way = cls(value, tensor, stops, normalizations)
            inputs = {leaf.input for leaf in way.leaves}
            made = [*way.between, *(leaf.operation for leaf in way.leaves)]
            elsewhere = {result: way._elsewhere(result) for each in made for result in each.results}
            further = {result for result, by in elsewhere.items() if by and result in inputs}
            if further:
                stops |= further
                continue
            for result, by in elsewhere.items():
                if by:
                    raise NotLinear(
                        f"what {result.producer.name if result.producer else ''} makes is read elsewhere too"
                    )
            way.parts = [result for result in elsewhere if way._is_apart(result)]
            for skip, why in way.skips.items():
                if skip not in inputs and skip not in stops:
                    raise NotLinear(why)
            return way

    def _operands(self, operation: Operation) -> list[Value]:
        """The values that come through an operation. Raises: NotLinear."""
        if operation.name not in _FACTORS:
            return operation.reads
        one, *others = operation.arguments
        for other in others:
            if isinstance(one, Value) and is_constant(one) and isinstance(other, Value):
                if operation.name.startswith("aten.div"):
                    raise NotLinear("something is divided by it")
                one, other = other, one
            if isinstance(other, Value) and not is_constant(other):
                raise NotLinear(f"it comes from {operation.name}")
            if operation.keywords:
                raise NotLinear(f"it comes from {operation.name} with a rounding")
        return [one]

    def _elsewhere(self, result: Value) -> bool:
        users = [user in self.between for user in result.users]
        # a part of a split that nothing between reads may be other channels: see check_parts
        return result is not self.value and any(users) and not all(users)

    def _is_apart(self, result: Value) -> bool:
        used = bool(result.users) or result.is_output
        return used and result is not self.value and not any(user in self.between for user in result.users)

    def check_parts(self, made: Value, comes: Tensor) -> None:
        """Raise NotLinear if what comes to the value, 1 where it does in `made`, comes to what others read too."""
        if self.parts:
            ones = self._replayer({made: comes.double()})
            nothing = self._replayer({})
            if any(not torch.equal(ones[part], nothing[part]) for part in self.parts):
                raise NotLinear("a part of it that is not its own is read elsewhere")

    def channels_of(self, made: Value, dim: int) -> tuple[Tensor, Tensor]:
        """For each channel of `made`, in its dimension `dim`, the channel to which it comes, and its factor there."""
        number = made.shape[dim]
        view = [-1 if at == dim else 1 for at in range(len(made.shape))]
        scale = self._arriving(made, torch.ones(made.shape, dtype=torch.float64))
        coded = [
            (self._arriving(made, codes.view(view).expand(made.shape).clone()), codes)
            for codes in _codes(number)
        ]
        arrived, origins, by = _constants(coded, scale, 1)
        if len(origins.unique()) < len(origins):
            raise NotLinear("a channel comes to several channels")
        channels, factors = torch.full((number,), -1), torch.ones(number, dtype=torch.float64)
        channels[origins], factors[origins] = arrived, by
        self.check_parts(made, (channels >= 0).view(view).expand(made.shape))
        return channels, factors

    def aligned(self, one: tuple[Value, int], other: tuple[Value, int]) -> bool:
        """Whether the positions of two values, whose channels are in these dimensions, come to the same places."""
        arrived = []
        for value, dim in (one, other):
            shape = [*value.shape[:dim], *value.shape[dim + 1 :]]
            codes = _codes(math.prod(shape))[0].view(shape).unsqueeze(dim).expand(value.shape).clone()
            scale = self._arriving(value, torch.ones(value.shape, dtype=torch.float64))
            arrived.append(self._arriving(value, codes) / scale)  # nan where it does not come to
        if arrived[0].shape != arrived[1].shape:
            return False
        apart = (arrived[0] - arrived[1]).abs()
        return bool((apart.isnan() | (apart <= _CLOSE)).all())

    def elements_of(self, term: Value) -> tuple[Tensor, Tensor, Tensor]:
        """For each element of a term its channel, and its factor; and which channels are covered."""
        number = term.shape.numel()
        scale = self._arriving(term, torch.ones(term.shape, dtype=torch.float64))
        coded = [(self._arriving(term, codes.view(term.shape)), codes) for codes in _codes(number)]
        channels, factors = torch.full((number,), -1), torch.ones(number, dtype=torch.float64)
        everywhere = torch.ones(scale.size(1), dtype=torch.bool)
        for channel, by in enumerate(_by_channel(scale)):
            some = by != 0
            everywhere[channel] = some.all()
            arrived = [(_by_channel(found)[channel][some] / by[some], codes) for found, codes in coded]
            origins = _decode(arrived)
            if bool((channels[origins.unique()] >= 0).any()):
                raise NotLinear(f"{term.name} comes to several channels")
            channels[origins], factors[origins] = channel, by[some]
            if not bool((factors[origins] == by[some]).all()):
                raise NotLinear(f"{term.name} comes with several factors")
        self.check_parts(term, (channels >= 0).view(term.shape))
        return channels.view(term.shape), factors.view(term.shape), everywhere

    def constant(self) -> Tensor:
        """The numbers that are added to each channel."""
        if not any(each.name in SUMS for each in self.between):
            return torch.zeros(self.value.shape[1], dtype=torch.float64)
        found = self._nothing().transpose(0, 1).flatten(1)
        if not bool((found == found[:, :1]).all()):
            raise NotLinear("numbers are added that differ within a channel")
        return found[:, 0] if found.size(1) else found.sum(1)

    def _nothing(self) -> Tensor:
        """What the value is when all that it comes from is 0."""
        if self._zero is None:
            self._zero = self._replay({})
        return self._zero

    def _arriving(self, coded: Value, codes: Tensor) -> Tensor:
        """By how much the value changes when `coded`, else 0, is `codes`."""
        return self._replay({coded: codes}) - self._nothing()

    def _replay(self, known: dict[Value, Tensor]) -> Tensor:
        return self._replayer(known)[self.value]

    def _replayer(self, known: dict[Value, Tensor]) -> Replay:
        ends = {leaf.operation.results[0] for leaf in self.leaves} | {*self.terms, *self.skips}

        def otherwise(value: Value) -> Tensor:
            if value not in ends and value.kind in ("parameter", "buffer"):  # a factor
                return self.tensor(value)
            return zeros(value)

        return Replay(known, otherwise, self.between | self.constants)

    @property
    def constants(self) -> set[Operation]:
        """The layout changes that make the factors."""
        return {made for each in self.between for made in _constants_of(each, self.between)}


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear operation that reads a value, through layout changes or not.

    channels: (inputs of the operation,) int64, which channel of the value each is; -1: one of something else.
    operations: itself, and all between.
    """

    linear: Linear
    channels: Tensor
    operations: set[Operation]


def readers(value: Value) -> list[Reader]:
    """The linear operations that read `value`, (N, C, ...), if nothing else does.

    Between may be layout changes, concatenation with other values and average pooling.

    Raises: NotLinear.
    """
    between: set[Operation] = set()
    found: dict[Operation, Linear] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if each.is_output:
            raise NotLinear("the model returns it")
        for user in each.users:
            linear = Linear.of(user)
            if linear is not None and not linear.is_normalization and linear.input is each:
                found[user] = linear
            elif user.name in _ARRANGED and _weighs_alike(user):
                if user not in between:
                    between.add(user)
                    waiting += user.results
            else:
                raise NotLinear(f"it goes into {user.name}")
    if not found:
        raise NotLinear("nothing reads it")
    return [
        Reader(each, _arriving_at(each, value, between), between.union(each.operations))
        for each in found.values()
    ]


def _arriving_at(linear: Linear, value: Value, between: set[Operation]) -> Tensor:
    scale = Replay({value: torch.ones(value.shape, dtype=torch.float64)}, zeros, between)[linear.input]
    coded = []
    for codes in _codes(value.shape[1]):
        given = codes.view(-1, *[1] * (len(value.shape) - 2)).expand(value.shape).clone()
        coded.append((Replay({value: given}, zeros, between)[linear.input], codes))
    places, origins, by = _constants(coded, scale, linear.input_dim)
    if not bool((by - 1).abs().le(_CLOSE).all()):
        raise NotLinear("it is padded or weighted on its way")
    channels = torch.full((linear.inputs,), -1)
    channels[places] = origins
    return channels


def _weighs_alike(operation: Operation) -> bool:
    """Whether a pool weighs every value alike at every size of the image: nothing padded, no window cut off."""
    if not operation.name.startswith("aten.avg_pool"):
        return True
    return not any(operation.argument("padding")) and not operation.argument("ceil_mode")


def is_constant(value: Value) -> bool:
    """Whether it is a parameter or buffer, or an arrangement of one."""
    while (made := value.producer) is not None and made.name in LAYOUT and len(made.reads) == 1:
        value = made.reads[0]
    return value.kind in ("parameter", "buffer")


def _constants_of(operation: Operation, between: set[Operation]) -> set[Operation]:
    """The layout changes that make the constants among what an operation reads."""
    found: set[Operation] = set()
    for value in operation.reads:
        if is_constant(value):
            while (made := value.producer) is not None and made not in between:
                found.add(made)
                value = made.reads[0]
    return found


def _by_channel(values: Tensor, dim: int = 1) -> Tensor:
    return values.transpose(0, dim).flatten(1)


Coded = list[tuple[Tensor, Tensor]]  # what has arrived of each of the codes


def _constants(coded: Coded, scale: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(channels to which something has come, which code it was, by what it was multiplied).

    coded, scale: what has come when the codes were given, and when ones were.
    Raises: NotLinear unless each is one code and one factor at all positions of the channel.
    """
    scale = _by_channel(scale, dim)
    some = (scale != 0).any(1).nonzero().flatten()
    scale = scale[some]
    if not scale.numel():
        raise NotLinear("nothing of it arrives")
    by = scale[:, :1]
    if not bool((scale - by).abs().le(_CLOSE * by.abs()).all()) or not bool((by != 0).all()):
        raise NotLinear("it is not in all positions of a channel with one factor")
    firsts = []
    for found, codes in coded:
        decoded = _by_channel(found, dim)[some] / by
        if not bool((decoded - decoded[:, :1]).abs().le(_CLOSE).all()):
            raise NotLinear("channels are mixed")
        firsts.append((decoded[:, 0], codes))
    return some, _decode(firsts), by[:, 0]


def _codes(number: int) -> list[Tensor]:
    """Twice as many numbers between 1 and 2, equally far apart, in different orders.

    A mean of some of the first is the one of another place perhaps, but that of the second is not.
    """
    generator = torch.Generator().manual_seed(0)
    orders = (torch.randperm(number, generator=generator) for _ in range(2))
    return [1 + order.double() / number for order in orders]


def _decode(coded: Coded) -> Tensor:
    """The places of the codes that have arrived. Raises: NotLinear if it is not one code."""
    arrived, codes = coded[0]
    ordered, places = codes.sort()
    close = 1 / (4 * len(codes))
    nearest = torch.searchsorted(ordered, arrived - close).clamp(max=len(codes) - 1)
    found = places[nearest]
    for arrived, codes in coded:
        if not bool((codes[found] - arrived).abs().le(_CLOSE).all()):
            raise NotLinear("channels are mixed")
    return found
