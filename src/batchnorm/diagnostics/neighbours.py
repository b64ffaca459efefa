"""Whether an example's output in evaluation depends on its neighbours in the batch, and by which module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchnorm.diagnostics.runs import Runs, examples, tensors

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
    """The modules by which the first example of a batch gets to know of the others, innermost."""
    batch = next((each for each in runs.batches if examples(each) > 1), None)
    if batch is None:
        return "it needs a batch of two examples or more"
    number = examples(batch)
    others = tree_map(lambda each: _with_copies(each, number), batch)
    try:
        first, second = _outputs(runs, batch, number), _outputs(runs, others, number)
    except Exception as why:
        return f"in evaluation the model fails: {type(why).__name__}: {why}".splitlines()[0]
    paths = {module: path for path, module in reversed([*runs.model.named_modules()])}
    if [module for module, *_ in first] != [module for module, *_ in second]:
        return "which modules are called depends on the batch"
    found: list[Leak] = []
    for (module, given, made), (_, given_2, made_2) in zip(first, second, strict=True):
        unchanged = len(given) == len(given_2) and all(
            _change(one, two) <= _MOVES / 100 for one, two in zip(given, given_2, strict=True)
        )
        if unchanged and _change(made, made_2) > _MOVES:
            path = runs.path(paths[module])
            inside = f"{path}." if path else ""
            if not any(leak.path.startswith(inside) for leak in found):  # one of its children is it
                found.append(Leak(path, module, _change(made, made_2)))
    # dynamic quantization has a scale for each batch
    return [leak for leak in found if not type(leak.module).__module__.startswith("torch.ao")]


def _outputs(runs: Runs, batch: Any, number: int) -> list[tuple[nn.Module, list[Tensor], Tensor]]:
    """Of each call of a module, the inner ones first, what it was given and made for the first example."""
    found: list[tuple[nn.Module, list[Tensor], Tensor]] = []
    kept: list[list[Tensor]] = []

    def before(_: nn.Module, arguments: Any, named: Any) -> None:
        given = [each for each in tensors((arguments, named)) if _has(each, number)]
        kept.append([each[0].detach().clone() for each in given])

    def after(module: nn.Module, _: Any, __: Any, made: Any) -> None:
        given = kept.pop()
        if _has(made, number) and given:
            found.append((module, given, made[0].detach().clone()))

    with runs.unharmed(), torch.no_grad():
        runs.model.eval()
        for module in runs.model.modules():  # taken away again by unharmed()
            module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
            module.register_forward_hook(after, with_kwargs=True)
        runs.call(batch)
    return found


def _has(value: Any, number: int) -> TypeGuard[Tensor]:
    """Whether it is a tensor of that many examples."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == number


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
