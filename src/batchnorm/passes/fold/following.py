"""Into the linear operations behind a layer: W·(s·x + t) + b is (W·s)·x + (W·t + b), where nothing is padded."""

from __future__ import annotations

from torch import Tensor, nn

from batchnorm.graph.sources import NotLinear, readers
from batchnorm.passes.fold.border import BORDERED
from batchnorm.passes.fold.normalization import Normalization, rest_of
from batchnorm.passes.fold.plan import Check, Plan, Tensors, Wanted, by_channel, own_names


def into_following(
    model: nn.Module, calls: list[Normalization], tensor: Tensors, borders: bool = False
) -> Plan:
    """How a layer, all of whose calls these are, is folded into what reads it.

    borders: whether a convolution that pads may get a map of what the layer's terms bring, see border.py.

    Raises: Left, NotLinear.
    """
    wanted, checks = Wanted(model, tensor), []
    taps: dict[str, Tensor] = {}
    instead = rest_of(calls[0].call.module)
    for each in calls:
        each.check_channels()
        if each.output is None:
            raise NotLinear("it has an activation")
        found = readers(each.output)
        for reader in found:
            linear = reader.linear
            wanted.into[wanted.home(linear)] = None
            weight = tensor(linear.weight)
            scale = by_channel(each.affine.scale, reader.channels, 1.0)
            shift = by_channel(each.affine.shift, reader.channels, 0.0)
            wanted.want(linear.weight, weight * linear.on_inputs(scale), [linear.operation])
            if not bool(shift.any()):
                continue
            if not linear.keeps_constants:
                home = wanted.home(linear)
                module = model.get_submodule(home)
                call = linear.operation.call
                alone = call is not None and call.module is module and len(linear.weight.users) == 1
                if not borders or type(module) not in BORDERED or linear.transposed or not alone:
                    raise NotLinear(f"{home} pads its output with zeros")
                of_inputs = weight * linear.on_inputs(shift)
                taps[home] = of_inputs.sum(1, keepdim=True)
                wanted.add_map(linear, taps[home])
            else:
                wanted.want_bias(linear, (weight * linear.on_inputs(shift)).flatten(1).sum(1))
        operations = set().union(*(reader.operations for reader in found))
        checks.append(Check(operations, [reader.linear.operation.results[0] for reader in found], each))
    wanted.check()
    path = calls[0].path
    touched = own_names(model, path) | set(wanted.values)
    return Plan(
        path,
        "folded",
        wanted.where,
        tuple(wanted.into),
        wanted.values,
        {path: instead},
        checks,
        wanted.added,
        touched,
        taps,
    )
