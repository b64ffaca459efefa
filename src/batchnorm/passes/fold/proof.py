"""Whether a model computes what it computed before."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Proof:
    """What a model computes from the example inputs and from random ones of their shapes."""

    cases: list[tuple[Any, Any, list[Tensor]]]

    @classmethod
    def of(cls, model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Proof:
        """Of a model as it is. Random inputs that it does not take, as an index in a float, are no case."""
        example = (inputs, keywords)
        cases = [(*example, outputs(model, *example))]
        random = random_like(example)
        with contextlib.suppress(Exception):
            cases.append((*random, outputs(model, *random)))
        return cls(cases)

    def error(self, model: nn.Module) -> float:
        """The largest difference of an output, as a share of its largest; inf for other shapes or an exception."""
        worst = 0.0
        for inputs, keywords, expected in self.cases:
            try:
                found = outputs(model, inputs, keywords)
            except Exception:
                return math.inf
            worst = max(worst, difference(found, expected))
        return worst


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest of its tensor; inf for other shapes."""
    if [each.shape for each in found] != [each.shape for each in expected]:
        return math.inf
    worst = 0.0
    for one, two in zip(found, expected, strict=True):
        if not two.numel():
            continue
        one, two = one.double(), two.double()
        apart = (one - two).abs().masked_fill(one.isnan() & two.isnan() | (one == two), 0).max().item()
        largest = two.nan_to_num(0, 0, 0).abs().max().item()
        worst = max(worst, apart / max(largest, 1e-30)) if apart == apart else math.inf
    return worst


def outputs(model: nn.Module, inputs: Any, keywords: Any) -> list[Tensor]:
    """The floating-point tensors that a model returns."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        returned = model(*copy.deepcopy(inputs), **copy.deepcopy(keywords))
    return [each for each in tensors_of(returned) if each.is_floating_point()]


def tensors_of(returned: Any) -> list[Tensor]:
    """The tensors in what a model returns: in containers, and in the attributes of objects."""
    found, seen = [], set()
    waiting = [returned]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            found.append(each)
        elif id(each) not in seen:
            seen.add(id(each))
            leaves = tree_leaves(each)
            if leaves != [each]:
                waiting += reversed(leaves)
            elif hasattr(each, "__dict__") and not isinstance(each, type | nn.Module) and not callable(each):
                waiting += reversed(list(vars(each).values()))
    return found


def random_like(given: Any) -> Any:
    """Random numbers in the place of each floating-point tensor."""
    generator = torch.Generator().manual_seed(0)
    return tree_map(
        lambda each: (
            torch.randn(each.shape, generator=generator, dtype=torch.float32).to(each)
            if isinstance(each, Tensor) and each.is_floating_point()
            else each
        ),
        given,
    )


def as_dtype(given: Any, dtype: torch.dtype) -> Any:
    """Each floating-point tensor in `dtype`."""
    return tree_map(
        lambda each: each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each, given
    )
