"""Branches that are added: a normalization, or a convolution, of what another convolution reads goes into that one.

RepVGG, MobileOne, RepViT and FastViT train such blocks: conv3×3(x) + conv1×1(x) + norm(x) is one convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from batchnorm.graph.linear import Linear
from batchnorm.graph.observation import Observation, Value
from batchnorm.graph.sources import SUMS, NotLinear, Origin, sources
from batchnorm.passes.fold.normalization import Left, Normalization, rest_of
from batchnorm.passes.fold.plan import Check, Plan, Tensors, Wanted, by_channel, inverse


class Nothing(nn.Module):
    """In the place of a branch that another one computes too: returns `NOTHING`, whatever it is given."""

    def forward(self, *_: Any, **__: Any) -> Any:
        return NOTHING


class _Nothing:
    """A 0 that costs nothing to add: x + NOTHING is x itself."""

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __rsub__ = __add__

    def __sub__(self, other: Any) -> Any:
        return -other

    def __repr__(self) -> str:
        return "NOTHING"

    def __reduce__(self) -> str:
        return "NOTHING"  # pickled and copied by name: there is one

    def __fx_create_arg__(self, _: Any) -> int:
        return 0


NOTHING = _Nothing()


def into_beside(model: nn.Module, calls: list[Normalization], tensor: Tensors) -> Plan:
    """How a layer is folded into a convolution that reads the same, and to which it is added.

    Raises: Left, NotLinear.
    """
    if len(calls) != 1 or calls[0].output is None:
        raise NotLinear("it is called several times, or has an activation")
    (layer,) = calls
    rest_of(layer.call.module)
    layer.check_channels()
    tensor.check_replaced(layer.call.module, [layer.call])
    assert layer.output is not None
    if layer.call.returns != [layer.output]:
        raise NotLinear("it returns something else")
    for total in _sums(layer.output):
        origin = _origin(total, tensor, layer.output)
        if origin is None:
            continue
        (skip,) = (each for each in origin.skips if each.value is layer.output)
        for source in origin.sources:
            if source.linear.input is not layer.value:
                continue
            inputs = inverse(skip.channels, total.shape[1])[source.channels.clamp(min=0)]
            inputs = torch.where(source.channels >= 0, inputs, -1)
            weight = source.linear.identity(inputs)
            if weight is None or len(inputs[inputs >= 0].unique()) < len(skip.channels):
                continue
            if not origin.aligned(skip, source):
                continue
            factors = by_channel(skip.factors, inputs, 0.0) / source.factors
            wanted = Wanted(model, tensor)
            linear = source.linear
            wanted.into[wanted.home(linear)] = None
            scale = by_channel(layer.affine.scale, inputs, 0.0) * factors
            shift = by_channel(layer.affine.shift, inputs, 0.0) * factors
            old = tensor(linear.weight)
            wanted.want(linear.weight, old + weight * linear.on_outputs(scale), [linear.operation])
            wanted.want_bias(linear, shift)
            tensor.check_changed([layer.output, *_before(total, origin)])
            check = Check(origin.operations, [total], layer, passes=False)
            return wanted.plan(layer.path, Nothing(), [check])
    raise NotLinear("it is not added to a convolution of the same")


def joined(model: nn.Module, seen: Observation, tensor: Tensors, among: set[str]) -> Iterator[Plan]:
    """Plans for convolutions `among` these paths, to let another one do their work: of the same input, and added."""
    for operation in seen.operations:
        linear = Linear.of(operation)
        if linear is None or operation.name != "aten.convolution" or linear.transposed:
            continue
        call, home = operation.call, linear.home
        if call is None or call.path != home or home not in among or call.returns != operation.results:
            continue
        if (
            len(seen.calls_of(call.module)) != 1
            or type(call.module).__module__.partition(".")[0] == "batchnorm"
        ):
            continue
        for total in _sums(operation.results[0]):
            try:
                plan = _join(model, linear, total, tensor)
            except (Left, NotLinear):
                continue
            if plan is not None:
                yield plan
                break


def _join(model: nn.Module, linear: Linear, total: Value, tensor: Tensors) -> Plan | None:
    origin = sources(total, tensor)
    (own,) = (each for each in origin.sources if each.linear.operation is linear.operation)
    if bool((own.channels < 0).any()):
        return None
    for other in origin.sources:
        into = other.linear
        if into.operation is linear.operation or not into.embeds(linear) or into.work < linear.work:
            continue
        outputs = inverse(other.channels, total.shape[1])[own.channels]
        if bool((outputs < 0).any()) or not origin.aligned(own, other):
            continue
        factors = own.factors / other.factors[outputs]
        wanted = Wanted(model, tensor)
        wanted.home(linear)
        wanted.into[wanted.home(into)] = None
        weight = tensor(linear.weight) * linear.on_outputs(factors)
        more = into.embed(linear, weight, outputs)
        if more is None:
            continue
        wanted.want(into.weight, tensor(into.weight) + more, [into.operation])
        if linear.bias is not None:
            bias = torch.zeros(into.weight.shape[0], dtype=torch.float64)
            bias[outputs] = tensor(linear.bias) * factors
            wanted.want_bias(into, bias)
        tensor.check_changed(_before(total, origin))
        check = Check(origin.operations, [total], None, (linear.operation.results[0],))
        return wanted.plan(linear.home, Nothing(), [check])
    return None


def _sums(value: Value) -> Iterator[Value]:
    """The sums that it goes into, one after the other, as long as nothing else reads it."""
    while (user := value.only_user) is not None and user.name in SUMS:
        value = user.results[0]
        yield value


def _origin(total: Value, tensor: Tensors, branch: Value) -> Origin | None:
    try:
        return sources(total, tensor, frozenset([branch]))
    except NotLinear:
        return None


def _before(total: Value, origin: Origin) -> list[Value]:
    """The values between the sources of a sum and the sum."""
    return [value for each in origin.operations for value in each.results if value is not total]
