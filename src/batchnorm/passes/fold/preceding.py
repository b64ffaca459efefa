"""Into the linear operations before a layer: W·x + b, then s·y + t, is s·W·x + (s·b + t)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchnorm.graph.observation import Operation
from batchnorm.graph.sources import Origin
from batchnorm.passes.fold.normalization import Left, Normalization, rest_of
from batchnorm.passes.fold.plan import Check, Plan, Tensors, Wanted, by_channel, inverse, own_origin


def into_preceding(
    model: nn.Module, calls: list[Normalization], tensor: Tensors, normalizations: bool = False
) -> Plan:
    """How a layer, all of whose calls these are, is folded into what comes before.

    normalizations: whether into other layers of its kind too.

    Raises: Left, NotLinear.
    """
    wanted, checks = Wanted(model, tensor), []
    instead = rest_of(calls[0].call.module)
    tensor.check_replaced(calls[0].call.module, [each.call for each in calls])
    for each in calls:
        each.check_channels()
        origin = own_origin(each.call, each.value, tensor, normalizations)
        _want(wanted, origin, each)
        checks.append(Check(origin.operations, [], each))
    return wanted.plan(calls[0].path, instead, checks)


def _want(wanted: Wanted, origin: Origin, layer: Normalization) -> None:
    """What one call wants: each source and term scaled, each channel shifted once, where there is a bias."""
    scale, tensor = layer.affine.scale, wanted.tensor
    shift = layer.affine.shift + (scale - 1) * origin.constant
    skipped = _in_place_of_skips(origin, scale - 1)
    shifted = torch.zeros(len(scale), dtype=torch.bool)

    def share(channels: Tensor, factors: Tensor, may: Tensor) -> Tensor:
        """What these elements have to bring of the shift: all of it, in channels that have none yet."""
        new = (channels >= 0) & (may & ~shifted)[channels.clamp(min=0)]
        shifted[channels[new]] = True
        return torch.where(new, by_channel(shift, channels, 0.0) / factors, 0.0)

    anywhere = torch.ones_like(shifted)
    for source in origin.sources:
        linear = source.linear
        wanted.into[wanted.home(linear)] = None
        by = by_channel(scale, source.channels, 1.0)
        new = tensor(linear.weight) * linear.on_outputs(by)
        if linear.operation in skipped:
            new = new + skipped[linear.operation]
        wanted.want(linear.weight, new, [linear.operation])
        if linear.bias is not None:
            wanted.want_bias(linear, share(source.channels, source.factors, anywhere), by)
    for term in origin.terms:
        more = share(term.channels, term.factors, term.everywhere)
        new = tensor(term.value) * by_channel(scale, term.channels, 1.0) + more
        wanted.want(term.value, new, [user for user in term.value.users if user in origin.operations])
    for source in origin.sources:
        if source.linear.bias is None and wanted.may_have_bias(source.linear):
            needed = bool(((source.channels >= 0) & ~shifted[source.channels.clamp(min=0)]).any())
            wanted.want_bias(source.linear, share(source.channels, source.factors, anywhere), needed=needed)
    if not bool((shifted | (shift == 0)).all()):
        raise Left("the operation before it has no place for a bias")


def _in_place_of_skips(origin: Origin, more: Tensor) -> dict[Operation, Tensor]:
    """What must be added to weights so that values that are only added come `1 + more` times, by operation.

    Such a value stays what it is, and is read by one of the operations as well: that one brings the rest of it.
    """
    found: dict[Operation, Tensor] = {}
    for skip in origin.skips:
        origins = inverse(skip.channels, len(more))
        missing = origins >= 0
        for source in origin.sources:
            if source.linear.input is not skip.value or not bool(missing.any()):
                continue
            brings = (source.channels >= 0) & missing[source.channels.clamp(min=0)]
            inputs = torch.where(brings, origins[source.channels.clamp(min=0)], -1)
            weight = source.linear.identity(inputs)
            if weight is None or not origin.aligned(skip, source):
                continue
            by = torch.where(brings, more[source.channels.clamp(min=0)], 0.0)
            by = by * by_channel(skip.factors, inputs, 0.0) / source.factors
            previous = found.get(source.linear.operation, torch.zeros(()))
            found[source.linear.operation] = previous + weight * source.linear.on_outputs(by)
            missing[source.channels[brings]] = False
        if bool((missing & (more != 0)).any()):
            raise Left("its input is added beside, which no operation before it can bring")
    return found
