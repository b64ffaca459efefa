"""The linear operations that a value comes from, and which of their channels come to which of its channels.

    found, terms = sources(norm.reads[0])    # of conv → reshape → concat → BN: each convolution, with its channels

Between may be whatever keeps a factor and a term of a channel what they are: layout changes, concatenation, sums and
average pooling. Where the channels go is not derived from the arguments of those operations but seen: they are called
again on codes, one number for each channel of one source and 0 for the others, and what arrives in a channel must be
one code everywhere. So reshapes, splits, shuffles and whatever else arranges values need no rules of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from batchnorm.graph.observation import LAYOUT, Operation, Value

_SUMS = frozenset({"aten.add", "aten.add_", "aten.sub", "aten.sub_"})
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
_PASSED = LAYOUT | _SUMS | _POOLS | {"aten.cat"}
_CLOSE = 1e-9


class NotLinear(Exception):
    """A value does not come from linear operations alone; the message says what is in between."""


@dataclass(frozen=True, eq=False)
class Source:
    """A linear operation, y = W·x + b, and where its channels go.

    weight: the parameter W as the operation reads it, a convolution's or a linear layer's.
    bias: the parameter b, or None.
    output_dim: the dimension of the weight that belongs to the channels of y.
    channels: (channels of y,) int64, the channel of the value to which each comes; -1 for those that do not.
    signs: (channels of y,) 1, or -1 where it is subtracted.
    """

    operation: Operation
    weight: Value
    bias: Value | None
    output_dim: int
    channels: Tensor
    signs: Tensor


@dataclass(frozen=True, eq=False)
class Term:
    """A parameter or buffer that is added: a bias beside a matrix product, an embedding of positions.

    channels: of its shape, int64, the channel of the value to which each element comes; -1 for those that do not.
    signs: of its shape, 1, or -1 where it is subtracted.
    everywhere: (channels of the value,) whether each position of the channel has one of its elements.
    """

    value: Value
    channels: Tensor
    signs: Tensor
    everywhere: Tensor


def sources(value: Value) -> tuple[list[Source], list[Term]]:
    """The linear operations whose outputs make up `value`, (N, C, ...), and what is added to them.

    Each channel of the value comes from one channel of at least one of them, of a sum from one of each; nothing else
    reads what is in between.

    Raises: NotLinear.
    """
    way = _Way.to(value)
    found = []
    reached = torch.zeros(value.shape[1], dtype=torch.bool)
    for leaf in way.leaves:
        weight, bias, output_dim, channel_dim = _parts(leaf)
        channels, signs = way.channels_of(leaf.results[0], channel_dim)
        reached[channels[channels >= 0]] = True
        found.append(Source(leaf, weight, bias, output_dim, channels, signs))
    if not bool(reached.all()):
        raise NotLinear("some channels do not come from a linear operation")
    return found, [Term(each, *way.elements_of(each)) for each in way.terms]


@dataclass(frozen=True)
class _Way:
    """All between a value and the linear operations, `leaves`, and `terms` that it comes from."""

    value: Value
    between: set[Operation]
    leaves: list[Operation]
    terms: list[Value]

    @classmethod
    def to(cls, value: Value) -> _Way:
        between: set[Operation] = set()
        leaves: dict[Operation, None] = {}
        terms: dict[Value, None] = {}
        waiting = [value]
        while waiting:
            each = waiting.pop()
            made = each.producer
            if each.is_output and each is not value:
                raise NotLinear("the model returns what is in between")
            if each.kind in ("parameter", "buffer"):
                terms[each] = None
            elif made is None:
                raise NotLinear(f"it comes from the {each.kind}")
            elif is_linear(made):
                leaves[made] = None
            elif made.name not in _PASSED:
                raise NotLinear(f"it comes from {made.name}")
            elif made.name in _SUMS and not all(isinstance(each, Value) for each in made.arguments[:2]):
                raise NotLinear("a number is added to it")
            elif made not in between:
                between.add(made)
                waiting += made.reads
        for operation in [*between, *leaves]:
            for result in operation.results:
                users = [user in between for user in result.users]
                # a part of a split that nothing between reads is other channels
                if result is not value and any(users) and not all(users):
                    raise NotLinear(f"what {operation.name} makes is read elsewhere too")
        return cls(value, between, list(leaves), list(terms))

    def channels_of(self, made: Value, dim: int) -> tuple[Tensor, Tensor]:
        """For each channel of what a leaf made, in its dimension `dim`, the channel to which it comes, and the sign."""
        codes = _codes(made.shape[dim])
        view = [-1 if at == dim else 1 for at in range(len(made.shape))]
        found = self._replay(made, codes.view(view).expand(made.shape).clone())
        channels, signs = torch.full((made.shape[dim],), -1), torch.ones(made.shape[dim])
        for channel, arrived in enumerate(found.transpose(0, 1).flatten(1)):
            first = arrived[0] if arrived.numel() else torch.zeros(())
            if not bool((arrived - first).abs().le(_CLOSE).all()):
                raise NotLinear("channels are mixed")
            if first.abs() <= _CLOSE:
                continue
            origin = _decode(first.reshape(1), codes)[0]
            if channels[origin] >= 0:
                raise NotLinear("a channel comes to several channels")
            channels[origin], signs[origin] = channel, first.sign()
        return channels, signs

    def elements_of(self, term: Value) -> tuple[Tensor, Tensor, Tensor]:
        """For each element of a term the channel to which it comes, and the sign; and the channels that are covered."""
        codes = _codes(term.shape.numel())
        found = self._replay(term, codes.view(term.shape))
        channels, signs = torch.full((len(codes),), -1), torch.ones(len(codes))
        everywhere = torch.ones(found.size(1), dtype=torch.bool)
        for channel, arrived in enumerate(found.transpose(0, 1).flatten(1)):
            some = arrived.abs() > _CLOSE
            everywhere[channel] = some.all()
            origins = _decode(arrived[some], codes)
            if bool((channels[origins.unique()] >= 0).any()):
                raise NotLinear(f"{term.name} comes to several channels")
            channels[origins], signs[origins] = channel, arrived[some].sign().float()
        return channels.view(term.shape), signs.view(term.shape), everywhere

    def _replay(self, coded: Value, codes: Tensor) -> Tensor:
        """What the value is when `coded` is `codes` and all else is 0, by calling the operations between again."""
        origins = [*(leaf.results[0] for leaf in self.leaves), *self.terms]
        known = {id(each): torch.zeros(each.shape, dtype=codes.dtype) for each in origins}
        known[id(coded)] = codes
        for operation in self._in_order():
            # copies, as an operation may change its arguments
            arguments = tree_map(partial(_tensor, known), (operation.arguments, operation.keywords))
            returned = operation.operator(*arguments[0], **arguments[1])
            made = [returned] if isinstance(returned, Tensor) else list(returned)
            known |= {id(result): each for result, each in zip(operation.results, made, strict=True)}
        return known[id(self.value)]

    def _in_order(self) -> Iterator[Operation]:
        """The operations between, each after those whose results it reads."""
        done: set[Operation] = set()
        stack = [self.value.producer]
        while stack:
            operation = stack[-1]
            if operation is None or operation in done or operation not in self.between:
                stack.pop()
                continue
            before = [
                made
                for each in operation.reads
                if (made := each.producer) in self.between and made not in done
            ]
            if before:
                stack += before
            else:
                done.add(operation)
                stack.pop()
                yield operation


def _codes(number: int) -> Tensor:
    """As many numbers, between 1 and 2, of which no two are alike and no mean of some is another."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(number, dtype=torch.float64, generator=generator) + 1


def _decode(arrived: Tensor, codes: Tensor) -> Tensor:
    """The places of these numbers among the codes. Raises: NotLinear if one is none of them."""
    ordered, places = codes.sort()
    nearest = torch.searchsorted(ordered, arrived.abs() - _CLOSE).clamp(max=len(codes) - 1)
    if not bool((ordered[nearest] - arrived.abs()).abs().le(2 * _CLOSE).all()):
        raise NotLinear("channels are mixed")
    return places[nearest]


def is_linear(operation: Operation) -> bool:
    """Whether this is a convolution or a matrix product with a parameter."""
    try:
        _parts(operation)
    except NotLinear:
        return False
    return True


def _parts(operation: Operation) -> tuple[Value, Value | None, int, int]:
    """(weight, bias, dimension of the weight for the outputs, dimension of the result for them)."""
    arguments = operation.arguments
    if operation.name == "aten.convolution":
        weight, bias, transposed = arguments[1], arguments[2], arguments[6]
        if isinstance(weight, Value) and weight.kind == "parameter":
            return weight, _parameter(bias), 1 if transposed else 0, 1
    elif operation.name in ("aten.addmm", "aten.mm"):
        bias, _, turned = arguments if operation.name == "aten.addmm" else (None, *arguments)
        made = turned.producer if isinstance(turned, Value) else None
        if made is not None and made.name == "aten.t" and not operation.keywords:
            weight = made.reads[0]
            if weight.kind == "parameter":
                return weight, _parameter(bias), 0, 1
    elif operation.name == "aten.linear":
        weight = arguments[1]
        if isinstance(weight, Value) and weight.kind == "parameter":
            bias = arguments[2] if len(arguments) > 2 else None
            return weight, _parameter(bias), 0, len(operation.results[0].shape) - 1
    raise NotLinear(f"{operation.name} is not linear with a parameter")


def _parameter(bias: Any) -> Value | None:
    if bias is None:
        return None
    if isinstance(bias, Value) and bias.kind == "parameter":
        return bias
    raise NotLinear("a bias that is no parameter")


def _tensor(known: Mapping[int, Tensor], argument: Any) -> Any:
    """A copy of the tensor that is known for a value; what is no value as it is."""
    return known[id(argument)].clone() if isinstance(argument, Value) else argument
