"""Whether an example's output in evaluation depends on its neighbours in the batch, and by which module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchnorm.diagnostics.runs import Runs, tensors

_MOVES = 1e-3  # of the largest value: beyond what other orders of summation do


@dataclass(frozen=True)
class Leak:
    """A module whose input of an example stayed, and whose output did not.

    path: of the module.
    module: itself.
    change: of the output, relative to its largest value.
    """

    path: str
    module: nn.Module
    change: float


def leaks(runs: Runs) -> list[Leak] | str:
    """The modules without children by which the first example of a batch gets to know of the others."""
    batch = next((each for each in runs.batches if _examples(each) > 1), None)
    if batch is None:
        return "it needs a batch of two examples or more"
    number = _examples(batch)
    others = tree_map(lambda each: _with_copies(each, number), batch)
    try:
        first, second = _outputs(runs, batch, number), _outputs(runs, others, number)
    except Exception as why:
        return f"in evaluation the model fails: {type(why).__name__}: {why}".splitlines()[0]
    if len(first) != len(second):
        return "which modules are called depends on the batch"
    found = []
    for (module, given, made), (_, given_2, made_2) in zip(first, second, strict=True):
        if _change(given, given_2) <= _MOVES / 100 < _MOVES < _change(made, made_2):
            path = next(path for path, each in runs.model.named_modules() if each is module)
            found.append(Leak(runs.path(path), module, _change(made, made_2)))
    return found


def _outputs(runs: Runs, batch: Any, number: int) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Of each call of a module without children what it was given and made for the first example."""
    found: list[tuple[nn.Module, Tensor, Tensor]] = []

    def hook(module: nn.Module, arguments: Any, made: Any) -> None:
        given = arguments[0] if arguments else None
        if _has(given, number) and _has(made, number):
            found.append((module, given[0].detach().clone(), made[0].detach().clone()))

    with runs.unharmed(), torch.no_grad():
        runs.model.eval()
        for module in runs.model.modules():
            if not module._modules or isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_hook(hook)  # taken away again by unharmed()
        runs.call(batch)
    return found


def _has(value: Any, number: int) -> TypeGuard[Tensor]:
    """Whether it is a tensor of that many examples."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == number


def _examples(batch: Any) -> int:
    sizes = {each.shape[0] if each.dim() else 0 for each in tensors(batch)}
    return sizes.pop() if len(sizes) == 1 else 0


def _with_copies(value: Any, number: int) -> Any:
    """A batch whose further examples are all the first one."""
    if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != number:
        return value
    return value[:1].expand_as(value).contiguous(memory_format=_format(value))


def _format(value: Tensor) -> torch.memory_format:
    channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _change(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or not one.is_floating_point():
        return 0.0 if one.shape == other.shape and torch.equal(one, other) else float("inf")
    largest = one.abs().max().clamp(min=1e-30) if one.numel() else one.new_ones(())
    return float(((one - other).abs().max() / largest).nan_to_num()) if one.numel() else 0.0
