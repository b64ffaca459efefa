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

from batchnorm.graph.observation import as_it_was, tensors_of

_REPEATED = 1e-6  # of the largest output: what two runs of a model may differ by


@dataclass(frozen=True)
class Proof:
    """What a model computes from the example inputs and from random ones of their shapes.

    noise: by how much the outputs change when the weights change by rounding: by 1 for a detector that sorts scores
        which are nearly equal, and then the outputs of the whole model say nothing.
    """

    cases: list[tuple[Any, Any, list[Tensor]]]
    noise: float = 0.0

    @classmethod
    def of(cls, model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Proof:
        """Of a model as it is. Random inputs that it does not take, as an index in a float, are no case."""
        example = (inputs, keywords)
        cases = [(*example, outputs(model, *example))]
        if not cls(cases).error(model) <= _REPEATED:
            raise ValueError(
                f"{type(model).__name__} computes something else each time that it runs, so that nothing can be "
                "proven: make it deterministic, or pass prove=False"
            )
        random = random_like(example)
        with contextlib.suppress(Exception):
            cases.append((*random, outputs(model, *random)))
        return cls(cases, _noise(model, cases))

    def error(self, model: nn.Module) -> float:
        """The largest difference, as a share of the largest output; inf for other shapes, nan for an exception."""
        worst = 0.0
        for inputs, keywords, expected in self.cases:
            try:
                found = outputs(model, inputs, keywords)
            except Exception:
                return math.nan  # worse than any tolerance
            worst = max(worst, difference(found, expected))
        return worst


def _noise(model: nn.Module, cases: list[tuple[Any, Any, list[Tensor]]]) -> float:
    generator = torch.Generator().manual_seed(1)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.is_floating_point():
                unit = 4 * torch.finfo(parameter.dtype).eps
                parameter.mul_(1 + unit * torch.randn(parameter.shape, generator=generator).to(parameter))
    worst = 0.0
    for inputs, keywords, expected in cases:
        worst = max(worst, min(difference(outputs(rounded, inputs, keywords), expected), 1.0))
    return worst


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest of its tensor; inf for other shapes.

    Of integers, which may be places or classes, the share that differs.
    """
    if [each.shape for each in found] != [each.shape for each in expected]:
        return math.inf
    worst = 0.0
    for one, two in zip(found, expected, strict=True):
        if not two.numel():
            continue
        if two.is_complex():
            one, two = torch.view_as_real(one.resolve_conj()), torch.view_as_real(two.resolve_conj())
        if not two.is_floating_point():
            worst = max(worst, (one != two).double().mean().item())
            continue
        one, two = one.double(), two.double()
        apart = (one - two).abs().masked_fill(one.isnan() & two.isnan() | (one == two), 0).max().item()
        largest = two.nan_to_num(0, 0, 0).abs().max().item()
        worst = max(worst, apart / max(largest, 1e-30)) if apart == apart else math.inf
    return worst


def outputs(model: nn.Module, inputs: Any, keywords: Any) -> list[Tensor]:
    """The tensors that a model returns; its buffers and the generators of random numbers are as before."""
    with torch.inference_mode(False), as_it_was(model), torch.no_grad():
        torch.manual_seed(0)
        returned = model(*copy.deepcopy(inputs), **copy.deepcopy(keywords))
    return [each.detach() for each in tensors_of(returned)]


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


def detached(given: Any) -> Any:
    """The same with tensors that are no part of a graph, and none of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return tree_map(lambda each: each.detach().clone() if isinstance(each, Tensor) else each, given)


def copy_of(model: nn.Module) -> nn.Module:
    """A copy; tensors that a graph has made, which modules keep in attributes, are copied without it."""
    made = [
        leaf
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules")
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor) and not leaf.is_leaf
    ]
    return copy.deepcopy(model, {id(each): each.detach().clone() for each in made})
