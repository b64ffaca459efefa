"""The padding of a model's input, told to each of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import conv, pooling
from torch.utils._pytree import tree_leaves

from batchnorm.graph.modules import is_compiled, is_normalization, is_ours, layers_of

_STRIDED = (conv._ConvNd, pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._LPPoolNd)
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Let every batch normalization of `model` leave out what is padding in the model's input.

    A layer within a Sequential cannot be handed a `mask=`. In this block each takes that of the model's input, (N, *S),
    at the positions that its own input has left: of a dimension of size L, those at 0, s, 2s, ... where a
    convolution or pooling of stride s has kept ⌈L/s⌉ or ⌊L/s⌋ of them; torch's modules are asked for their stride, for
    others it follows from the sizes. An input of (N, C), or of a single position, counts the samples that have any
    valid position. A layer that is called with `mask=` keeps that.

    Only batch normalization is masked: a convolution still sees what is at padding, and a layer's output is 0 there.
    Of a model with activation checkpoints the backward pass belongs into the block too, as it calls the layers again.

    Args:
        model: whose layers are ours; call it, or parts of it, in the block.
        mask: bool, (N, *S) or (N, 1, *S), True where a position of the model's input counts; dimensions of size 1
            hold for any size. Or int64 or int32 of shape (N,), the lengths of sequences: so many positions count along
            the last dimension of the model's input, its first tensor.

    Yields: None.

    Raises:
        TypeError: `mask` is neither bool nor integers of shape (N,).
        ValueError: at once, for a normalization that takes no mask (torch's, say: `bn.upgrade` first) and a compiled
            model; from a layer, with its name, where the mask of its input does not follow from that of the model's.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3, stride=2, padding=1), bn.BatchNorm1d(8))
        >>> with bn.mask(model, torch.tensor([50, 7])):
        ...     y = model(torch.randn(2, 4, 50))
        >>> y.shape[2], y[1, :, 4:].abs().max().item()
        (25, 0.0)
    """
    masks = _Masks(mask)
    _check(model)
    handles = []
    try:
        for name, layer in layers_of(model).items():
            hand_over = partial(masks.hand_over, name)
            handles.append(layer.register_forward_pre_hook(hand_over, prepend=True, with_kwargs=True))
        for module in model.modules():
            if isinstance(module, _STRIDED) and not isinstance(module, conv._ConvTransposeNd):
                handles.append(module.register_forward_hook(masks.follow))
        handles.append(model.register_forward_pre_hook(masks.begin, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(model: nn.Module) -> None:
    """Refuse a model of which a layer would not take the mask, before anything changes."""
    for name, module in model.named_modules():
        if is_normalization(module) and not is_ours(module):
            raise ValueError(
                f"{name!r} is a {type(module).__module__}.{type(module).__qualname__}, which takes no mask: "
                "convert the model with bn.upgrade(model) first"
            )
        if is_compiled(module):
            raise ValueError(
                f"{name or 'model'!r} is compiled, and compiled code does not see what a block like this one attaches "
                "to modules: use the model without torch.compile, or hand mask= to its layers"
            )


class _Masks:
    """The mask of a model's input, and those that follow from it, each (N, *S)."""

    def __init__(self, given: Tensor) -> None:
        if not isinstance(cast(object, given), Tensor):
            raise TypeError(f"mask must be a tensor, got {type(given).__name__}: use torch.as_tensor(mask)")
        self._lengths = given if given.dtype in (torch.int64, torch.int32) and given.dim() == 1 else None
        if self._lengths is None and (given.dtype != torch.bool or not given.dim()):
            raise TypeError(
                "mask must be a bool tensor (True = counted), (N, *S), or the lengths of sequences, (N,) integers; "
                f"got {given.dtype}, {tuple(given.shape)}: use mask.bool()"
            )
        one_channel = given.dim() > 2 and given.size(1) == 1
        self._known = [] if self._lengths is not None else [given.squeeze(1) if one_channel else given]

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's forward: forget what followed; lengths are of its input."""
        del self._known[1:]
        if self._lengths is None:
            return
        inputs = (each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        x = next((each for each in inputs if each.dim() > 1), torch.empty(0, 0))
        lengths = self._lengths.to(x.device)
        found = torch.arange(x.size(-1), device=x.device) < lengths[:, None]
        longest = int(lengths.max()) if len(lengths) else 0
        of_other = longest < x.size(-1) and x.dim() == 3 and longest == x.size(1)  # (N, L, C), it seems
        if len(lengths) != x.size(0) or longest > x.size(-1) or of_other:
            raise ValueError(
                f"lengths {lengths.tolist()} do not count along the last dimension of the model's input, "
                f"{tuple(x.shape)}: give a bool mask, (N, *S), True where a position counts"
            )
        self._known = [found]

    def follow(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a convolution or pooling: its stride says what is left of the mask of its input."""
        y = output[0] if isinstance(output, tuple) else output
        found = self._find(args[0].shape) if args else None
        if found is None or self._find(y.shape) is not None:
            return
        strides = cast(int | tuple[int, ...], module.stride)
        for dim in range(1 - found.dim(), 0):
            stride = strides if isinstance(strides, int) else strides[dim]
            strided = _strided(found, dim, y.size(dim), stride)
            if strided is None:
                return
            found = strided
        self._known.append(found)

    def hand_over(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments | None:
        """Before a layer's forward: its arguments, with a mask."""
        if len(args) > 2 or kwargs.get("mask") is not None:
            return None
        shape = (args[0] if args else kwargs["input"]).shape
        if not self._known:
            raise ValueError(
                f"layer {name!r} was called without the model, whose input lengths are of: give a bool mask"
            )
        found = self._of(shape)
        if found is None or found.size(0) not in (1, shape[0]):
            raise ValueError(
                f"layer {name!r}: which positions of its input {tuple(shape)} are padding does not follow from the "
                f"mask of the model's input, (N, *S) = {tuple(self._known[0].shape)}, as by a stride: hand mask= to it"
            )
        ones = [1] * (len(shape) - found.dim())
        return args, {**kwargs, "mask": found.reshape(found.size(0), *ones, *found.shape[1:])}

    def _of(self, shape: torch.Size) -> Tensor | None:
        """The mask of a tensor of this shape, (N, C, *S)."""
        if shape[2:].numel() == 1:
            return self._known[0].flatten(1).any(1) if self._known[0].dim() > 1 else self._known[0]
        found = self._find(shape)
        if found is None:
            shrunk = (_shrunk(each, shape) for each in reversed(self._known))
            found = next((each for each in shrunk if each is not None), None)
            if found is not None:
                self._known.append(found)
        return found

    def _find(self, shape: torch.Size) -> Tensor | None:
        return next((each for each in self._known if _fits(each, shape)), None)


def _fits(mask: Tensor, shape: torch.Size) -> bool:
    dims = mask.dim() - 1
    return dims <= len(shape) - 2 and all(mask.size(dim) in (1, shape[dim]) for dim in range(-dims, 0))


def _strided(mask: Tensor, dim: int, size: int, stride: int) -> Tensor | None:
    """The `size` positions of `mask` that a stride leaves, if it leaves so many."""
    have = mask.size(dim)
    if have == 1:
        return mask
    if size not in (have // stride, -(-have // stride)):
        return None
    return mask.index_select(dim, torch.arange(size, device=mask.device) * stride)


def _shrunk(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """`mask` at the positions that any stride leaves, if all strides which leave so many leave the same mask."""
    if mask.dim() > len(shape) - 1:
        return None
    for dim in range(1 - mask.dim(), 0):
        have, size = mask.size(dim), shape[dim]
        if have in (1, size):
            continue
        strides = (
            [have // size]
            if size and have % size == 0
            else range(have // (size + 1), have // max(size - 1, 1) + 1)
        )
        masks = [found for s in strides if s > 1 and (found := _strided(mask, dim, size, s)) is not None]
        if not masks or not all(torch.equal(masks[0], other) for other in masks[1:]):
            return None
        mask = masks[0]
    return mask
