"""Call observed operations again, on other tensors than those that were seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from batchnorm.graph.observation import Operation, Value

Otherwise = Callable[[Value], Tensor]


def zeros(value: Value) -> Tensor:
    """Zeros in the shape of a value, float64."""
    return torch.zeros(value.shape, dtype=torch.float64)


class Replay:
    """What values are when some are given: the operations between are called again, each once.

    known: the tensors that are given.
    otherwise: makes the tensor of a value that is neither given nor a result of `between`.
    between: the operations that may be called; None for all.
    after: what is done to the results of an operation.
    """

    def __init__(
        self,
        known: Mapping[Value, Tensor],
        otherwise: Otherwise = zeros,
        between: set[Operation] | None = None,
        after: Mapping[Operation, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self._known = dict(known)
        self._otherwise = otherwise
        self._between = between
        self._after = after or {}

    def __getitem__(self, value: Value) -> Tensor:
        for operation in self._in_order(value):
            arguments, keywords = tree_map(self._copy, (operation.arguments, operation.keywords))
            returned = _call(operation, arguments, keywords)
            made = [returned] if isinstance(returned, Tensor) else list(returned)
            if operation in self._after:
                made[0] = self._after[operation](made[0])
            for result, tensor in zip(operation.results, made, strict=True):
                self._known.setdefault(result, tensor)
        return self._of(value)

    def __setitem__(self, value: Value, tensor: Tensor) -> None:
        self._known[value] = tensor

    def _of(self, value: Value) -> Tensor:
        if value not in self._known:
            self._known[value] = self._otherwise(value)
        return self._known[value]

    def _copy(self, argument: Any) -> Any:
        """A copy, as an operation may change its arguments."""
        return self._of(argument).clone() if isinstance(argument, Value) else argument

    def _callable(self, value: Value) -> Operation | None:
        made = value.producer
        if value in self._known or made is None or made.operator is None:
            return None
        return made if self._between is None or made in self._between else None

    def _in_order(self, value: Value) -> Iterator[Operation]:
        """The operations that make it from what is known, each after those whose results it reads."""
        done: set[Operation] = set()
        stack = [value]
        while stack:
            operation = self._callable(stack[-1])
            if operation is None or operation in done:
                stack.pop()
                continue
            before = [each for each in operation.reads if (made := self._callable(each)) and made not in done]
            if before:
                stack += before
            else:
                done.add(operation)
                stack.pop()
                yield operation


def _call(operation: Operation, arguments: Any, keywords: Any) -> Any:
    if operation.name in ("aten.view", "aten._unsafe_view"):  # of tensors in another memory format, perhaps
        return arguments[0].reshape(arguments[1])
    return operation.operator(*arguments, **keywords)
