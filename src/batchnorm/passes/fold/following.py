"""Into the linear operations behind a layer: W·(s·x + t) + b is (W·s)·x + (W·t + b), where nothing is padded."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from batchnorm.graph.linear import Linear
from batchnorm.graph.observation import LAYOUT, Operation, Value
from batchnorm.graph.sources import NotLinear, readers
from batchnorm.passes.fold.border import BORDERED
from batchnorm.passes.fold.normalization import Normalization, rest_of
from batchnorm.passes.fold.plan import Check, Plan, Tensors, Wanted, by_channel


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
    tensor.check_replaced(calls[0].call.module, [each.call for each in calls])
    for each in calls:
        each.check_channels()
        if each.output is None:
            raise NotLinear("it has an activation")
        found = readers(each.output)
        between = set().union(*(reader.operations - set(reader.linear.operations) for reader in found))
        tensor.check_changed([each.output, *(result for made in between for result in made.results)])
        targets = []
        operations = set().union(*(reader.operations for reader in found))
        for reader in found:
            linear = reader.linear
            wanted.into[wanted.home(linear)] = None
            weight = tensor(linear.weight)
            scale = by_channel(each.affine.scale, reader.channels, 1.0)
            shift = by_channel(each.affine.shift, reader.channels, 0.0)
            wanted.want(linear.weight, weight * linear.on_inputs(scale), [linear.operation])
            addition = _bias_behind(linear, wanted.home(linear)) if linear.bias is None else None
            targets.append((linear.operation if addition is None else addition.operation).results[0])
            if addition is not None:
                operations |= addition.between
            if not bool(shift.any()):
                continue
            brought = weight * linear.on_inputs(shift)
            if not linear.keeps_constants:
                home = wanted.home(linear)
                module = model.get_submodule(home)
                call = linear.operation.call
                alone = call is not None and call.module is module and len(linear.weight.users) == 1
                if not borders or type(module) not in BORDERED or linear.transposed or not alone:
                    raise NotLinear(f"{home} pads its output with zeros")
                taps[home] = brought.sum(1, keepdim=True)
                wanted.add_map(linear, taps[home])
            elif addition is not None:
                more = brought.flatten(1).sum(1)
                wanted.want(addition.bias, tensor(addition.bias) + more, [addition.operation])
            else:
                wanted.want_bias(linear, brought.flatten(1).sum(1))
        checks.append(Check(operations, targets, each))
    return wanted.plan(calls[0].path, instead, checks, taps)


class _Addition(NamedTuple):
    """Where a module adds its bias: the operation, the bias, and all since the product."""

    operation: Operation
    bias: Value
    between: set[Operation]


def _bias_behind(linear: Linear, home: str) -> _Addition | None:
    """The addition of the module's own bias behind a product, which torch makes of a linear layer now and then."""
    value, between = linear.operation.results[0], set()
    while (user := value.only_user) is not None:
        between.add(user)
        if user.name in ("aten.add", "aten.add_"):
            others = [each for each in user.reads if each is not value]
            own = f"{home}.bias".lstrip(".")
            if len(others) == 1 and others[0].name == own and others[0].shape == linear.weight.shape[:1]:
                return _Addition(user, others[0], between) if not user.keywords else None
            return None
        if user.name not in LAYOUT:
            return None
        value = user.results[0]
    return None
