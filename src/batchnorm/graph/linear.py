"""Operations y = W·x + b of a parameter W: where inputs and outputs are in it, and what of it makes y = x."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.graph.observation import BATCH_NORM, Operation, Value


@dataclass(frozen=True, eq=False)
class Linear:
    """A convolution, transposed convolution or matrix product; or a normalization by constants, x̂ times a weight.

    operation: the call.
    input: x; of a normalization what it normalizes.
    weight: the parameter W as the operation reads it: (O, I / groups, ...) of a convolution, (I, O / groups, ...) of a
        transposed one, (O, I) of a product, (C,) of a normalization.
    bias: the parameter b, (O,), or None.
    input_dim, output_dim: the dimension of x and of y in which their channels are.
    groups: of a convolution.
    transposed: whether it is a transposed convolution.
    """

    operation: Operation
    input: Value
    weight: Value
    bias: Value | None
    input_dim: int
    output_dim: int
    groups: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, operation: Operation) -> Linear | None:
        """The operation as one of these, or None."""
        arguments = operation.arguments
        if operation.name == "aten.convolution":
            given, weight, bias, *_, transposed, _, groups = arguments
            if _is_parameter(weight) and (bias is None or _is_parameter(bias)):
                return cls(operation, given, weight, bias, 1, 1, groups, transposed)
        elif operation.name in ("aten.addmm", "aten.mm"):
            bias, given, turned = arguments if operation.name == "aten.addmm" else (None, *arguments)
            made = turned.producer if isinstance(turned, Value) else None
            if (
                made is not None
                and made.name == "aten.t"
                and not operation.keywords
                and _is_parameter(made.arguments[0])
                and (bias is None or (_is_parameter(bias) and bias.shape == made.arguments[0].shape[:1]))
            ):
                return cls(operation, given, made.arguments[0], bias, 1, 1)
        elif operation.name == "aten.linear":
            given, weight, bias = (*arguments, None)[:3]
            if _is_parameter(weight) and (bias is None or _is_parameter(bias)):
                last = len(given.shape) - 1
                return cls(operation, given, weight, bias, last, last)
        elif operation.name in BATCH_NORM and operation.name.startswith("aten"):
            given, weight, bias, *_ = arguments
            if normalizes_by_constants(operation) and _is_parameter(weight) and _is_parameter(bias):
                return cls(operation, given, weight, bias, 1, 1)
        return None

    @property
    def operations(self) -> list[Operation]:
        """The operation itself, and the transposition of a weight that it reads transposed."""
        made = [each.producer for each in self.operation.reads if each is not self.input]
        return [self.operation, *(each for each in made if each is not None and each.name == "aten.t")]

    @property
    def is_normalization(self) -> bool:
        return len(self.weight.shape) == 1

    @property
    def home(self) -> str:
        """The path of the module whose parameter the weight is."""
        return self.weight.name.rpartition(".")[0]

    @property
    def inputs(self) -> int:
        """The number of channels of x."""
        return self.input.shape[self.input_dim]

    def on_outputs(self, values: Tensor) -> Tensor:
        """`values`, (outputs,), in a shape that broadcasts against the weight."""
        shape = self.weight.shape
        if not self.transposed:
            return values.view(-1, *[1] * (len(shape) - 1))
        of_group = values.view(self.groups, 1, -1)
        of_group = of_group.expand(self.groups, shape[0] // self.groups, -1).flatten(0, 1)
        return of_group.view(shape[0], shape[1], *[1] * (len(shape) - 2))

    def on_inputs(self, values: Tensor) -> Tensor:
        """`values`, (inputs,), in a shape that broadcasts against the weight."""
        shape = self.weight.shape
        if self.transposed:
            return values.view(-1, *[1] * (len(shape) - 1))
        of_group = values.view(self.groups, 1, -1)
        of_group = of_group.expand(self.groups, shape[0] // self.groups, -1).flatten(0, 1)
        return of_group.reshape(shape[0], shape[1], *[1] * (len(shape) - 2))

    @property
    def keeps_constants(self) -> bool:
        """Whether an x that is constant in each channel makes such a y, whatever its size: nothing is padded."""
        if self.operation.name != "aten.convolution":
            return not self.is_normalization
        return not self.transposed and not any(self.operation.arguments[4])

    def identity(self, channels: Tensor) -> Tensor | None:
        """What the weight of a convolution or product is for y[o] = x[channels[o]], 0 where that is -1; or None.

        None if it cannot be: a stride, no tap of the kernel at the output's own position, or another group's channel.
        """
        shape = self.weight.shape
        if self.transposed or self.is_normalization:
            return None
        tap: tuple[int, ...] = ()
        if self.operation.name == "aten.convolution":
            strides, paddings, dilations = self.steps
            tap = tuple(p // d for p, d in zip(paddings, dilations, strict=True))
            for size, at, stride, padding, dilation in zip(
                shape[2:], tap, strides, paddings, dilations, strict=True
            ):
                if stride != 1 or padding % dilation or at >= size:
                    return None
        outputs = (channels >= 0).nonzero().flatten()
        first = outputs // (shape[0] // self.groups) * shape[1]  # channel of the output's group
        within = channels[outputs] - first
        if bool(((within < 0) | (within >= shape[1])).any()):
            return None
        weight = torch.zeros(shape, dtype=torch.float64)
        weight.index_put_(_places(outputs, within, *tap), torch.ones((), dtype=torch.float64))
        return weight

    def embeds(self, other: Linear) -> bool:
        """Whether a weight of this convolution can be what `other`, of the same x and y, computes."""
        if {self.operation.name, other.operation.name} != {
            "aten.convolution"
        } or self.input is not other.input:
            return False
        if self.transposed or other.transposed or other.groups % self.groups:
            return False
        if self.operation.results[0].shape != other.operation.results[0].shape:
            return False
        return self.steps[0] == other.steps[0] and self._taps(other) is not None

    def embed(self, other: Linear, weight: Tensor, outputs: Tensor) -> Tensor | None:
        """The weight with which this convolution computes at `outputs[o]` what `other` with `weight` does at o.

        None if an output is in a group that does not read what it reads.
        """
        taps = self._taps(other)
        assert taps is not None
        found = torch.zeros(self.weight.shape, dtype=torch.float64)
        per_group, own = other.weight.shape[0] // other.groups, self.weight.shape
        numbers = torch.arange(math.prod(own[2:])).view(own[2:])
        for dim, of_dim in enumerate(taps):
            numbers = numbers.index_select(dim, torch.tensor(of_dim))
        at = numbers.flatten()
        for output in range(other.weight.shape[0]):
            first = output // per_group * other.weight.shape[1]
            place = int(outputs[output])
            first -= place // (own[0] // self.groups) * own[1]
            if not 0 <= first <= own[1] - other.weight.shape[1]:
                return None
            span = slice(first, first + other.weight.shape[1])
            part = found[place, span].flatten(1)
            part[:, at] = weight[output].flatten(1)
            found[place, span] = part.view(-1, *own[2:])
        return found

    def _taps(self, other: Linear) -> list[list[int]] | None:
        """For each dimension of the kernel, the taps at which the taps of `other` are."""
        found = []
        ours = zip(self.weight.shape[2:], *self.steps[1:], strict=True)
        theirs = zip(other.weight.shape[2:], *other.steps[1:], strict=True)
        for (size, p, d), (other_size, other_p, other_d) in zip(ours, theirs, strict=True):
            places = [at * other_d - other_p + p for at in range(other_size)]
            if any(place % d or not 0 <= place // d < size for place in places):
                return None
            found.append([place // d for place in places])
        return found

    @property
    def steps(self) -> list[list[int]]:
        """Strides, paddings and dilations of a convolution, one for each dimension of the kernel."""
        rank = len(self.weight.shape) - 2
        return [list(each) * rank if len(each) == 1 else list(each) for each in self.operation.arguments[3:6]]

    @property
    def work(self) -> int:
        """The number of elements of the weight."""
        return math.prod(self.weight.shape)


def normalizes_by_constants(operation: Operation) -> bool:
    """Whether a call of one of torch's batch norm operators takes its moments from buffers, not from a batch."""
    if operation.name in ("aten._native_batch_norm_legit_no_training", "aten._batch_norm_no_update"):
        return True
    if operation.name == "aten._batch_norm_with_update":
        return False
    return not operation.argument("training") and operation.argument("running_mean") is not None


def _places(first: Tensor, *others: Tensor | int) -> tuple[Tensor, ...]:
    return (first, *(torch.as_tensor(each).expand(first.shape) for each in others))


def _is_parameter(value: Any) -> bool:
    return isinstance(value, Value) and value.kind == "parameter"
