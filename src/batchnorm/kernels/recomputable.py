"""Functions whose result need not be kept: they cost one pass over memory, draw no random number and keep no state.

A `Watch` sees them called and notes their results in the recording: activations, sums, gates, padding, concatenation,
torch's own batch normalization. So what is behind a layer, and torch's layers themselves, are made again too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from batchnorm.kernels.recipes import Make, Recipe, Recording, Saved, View, storages

Function = Callable[..., Any]


class Watch(TorchFunctionMode):
    """Notes in `recording` the results of the functions below."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        again = None if torch.compiler.is_compiling() else _FUNCTIONS.get(func)
        if again is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        return _noted(self._recording, func, again, args, kwargs)


def _noted(
    recording: Recording, func: Function, again: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """func(*args, **kwargs), whose result is noted if keeping what it is made from takes less than keeping it."""
    make: Make
    if again is _batch_norm:
        make, tensors = _batch_norm(func, args, kwargs)
    else:
        make, tensors = _replayed(again, args, kwargs)
    known = [recording.recipe_of(tensor) for tensor in tensors]
    joins = func in _JOINS
    if not joins and again is not _batch_norm and not any(known):
        return func(*args, **kwargs)
    # before the call, which may change one of them in place; what is not made again must not be changed
    sources = [recording.source(tensor) for tensor in tensors]
    plain = [tensor for tensor, recipe in zip(tensors, known, strict=True) if recipe is None]
    versions = [tensor._version for tensor in plain]
    before, recording.packed = recording.packed, []
    try:
        output = func(*args, **kwargs)
        changed = [tensor._version for tensor in plain] != versions
        if type(output) is Tensor and output.requires_grad and not changed:
            # a batch normalization's own input is saved by itself, so it costs nothing
            kept = 0 if again is _batch_norm else sum(storages(plain).values())
            if kept <= output.nbytes // (1 if joins else 2):
                recording.add(output, make, sources)
                if func in _ACTIVATIONS and known[0] is not None:
                    _share_input(recording.packed, output, known[0])
    finally:
        recording.packed = before
    return output


def _share_input(packed: list[Saved], output: Tensor, recipe: Recipe) -> None:
    """Save by `recipe` the copy of its input that autograd makes for an activation in place.

    Of an activation nothing else is saved that has the shape of its output, apart from that itself.
    """
    for saved in packed:
        tensor = saved.tensor
        if (
            tensor is not None
            and View.of(tensor) == recipe.view == View.of(output)
            and tensor.dtype == output.dtype
        ):
            saved.become(recipe)


def _replayed(again: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Make, list[Tensor]]:
    """`again` as a function of the tensors among the arguments, and these."""
    names, number = list(kwargs), len(args)
    values = [*args, *kwargs.values()]
    tensors = list(_tensors(values))

    def make(*given: Tensor) -> Tensor:
        rest = iter(given)
        filled = [_filled(value, rest) for value in values]
        result: Tensor = again(*filled[:number], **dict(zip(names, filled[number:], strict=True)))
        return result

    # the arguments must not hold the tensors
    for place, value in enumerate(values):
        values[place] = _emptied(value)
    return make, tensors


class _Place:
    """Where a tensor was among the arguments."""


def _tensors(values: list[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (each for each in value if isinstance(each, Tensor))


def _emptied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Place
    if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
        return [_emptied(each) for each in value]
    return value


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    if value is _Place:
        return next(tensors)
    return [_filled(each, tensors) for each in value] if type(value) is list and _Place in value else value


def _batch_norm(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Make, list[Tensor]]:
    """torch's batch normalization without its running statistics, which have been moved."""
    named = dict(zip(_SIGNATURES[func], args, strict=False)) | kwargs
    x, training, eps = named["input"], named.get("training", False), named.get("eps", 1e-5)
    # copies: an optimizer's step or the next batch would change them
    mean, variance, weight, bias = (
        None if (values := named.get(name)) is None else values.detach().clone()
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    if training:
        mean = variance = None

    def make(x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, training, 0.0, eps)

    return make, [x]


def _out_of_place(function: Function) -> Function:
    """A function of torch.nn.functional, with inplace=False."""
    place = list(inspect.signature(function).parameters).index("inplace")

    def again(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("inplace", None)
        return function(*args[:place], **kwargs)

    return again


_SIGNATURES: dict[Function, tuple[str, ...]] = {
    F.batch_norm: tuple(inspect.signature(F.batch_norm).parameters),
    torch.batch_norm: (
        "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled",
    ),
}  # fmt: skip
_JOINS: set[Function] = {torch.cat, torch.concat, torch.concatenate}
_ACTIVATIONS = (
    F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.celu, F.selu, F.silu, F.mish, F.hardswish, F.hardsigmoid,
)  # fmt: skip
# of autocast's lists only the concatenation is in one, and that promotes as it does without
_OPERATIONS = (
    "relu", "sigmoid", "tanh", "clamp", "clamp_min", "clamp_max", "add", "sub", "mul", "div", "neg", "clone",
    "contiguous", "where",
)  # fmt: skip


def _functions() -> dict[Function, Function]:
    """By which function each is made again: itself, or what does the same and not in place."""
    found: dict[Function, Function] = dict.fromkeys(_SIGNATURES, _batch_norm)
    others: tuple[Any, ...] = (F.pad, F.gelu, F.sigmoid, F.tanh, torch.rsub, Tensor.__rsub__)
    found |= {function: function for function in (*_JOINS, *others)}
    for function in _ACTIVATIONS:
        found[function] = _out_of_place(function)
    for name in _OPERATIONS:
        for home in (torch, Tensor):
            again = getattr(home, name, None)
            if again is not None:
                found[again] = again
                if (in_place := getattr(home, f"{name}_", None)) is not None:
                    found[in_place] = again
    return found


_FUNCTIONS = _functions()
