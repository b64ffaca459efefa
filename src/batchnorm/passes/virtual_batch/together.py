"""Normalise the parts of one batch jointly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.functional import check_residual
from batchnorm.layers import _BatchNorm
from batchnorm.moments import positions
from batchnorm.statistics import Population, Renorm, Sync


def together(
    layer: _BatchNorm, forward: Callable[..., Tensor], parts: list[dict[str, Any]]
) -> tuple[Tensor, ...]:
    """The outputs of `layer` for the `parts` of one batch, each the arguments of its forward."""
    inputs: list[Tensor] = [part["input"] for part in parts]
    residuals, masks = ([part.get(name) for part in parts] for name in ("residual", "mask"))
    if any(mask is not None for mask in masks):  # then all parts need one
        masks = [
            torch.ones_like(x[:, :1], dtype=torch.bool) if mask is None else positions(mask, x)
            for mask, x in zip(masks, inputs, strict=True)
        ]
    if len({x.shape[1:] for x in inputs}) == 1:
        output = forward(torch.cat(inputs), _cat(residuals), _cat(masks))
        # clones, since the next operation may work in place
        return tuple(part.clone() for part in output.split([x.size(0) for x in inputs]))
    return _of_different_sizes(layer, inputs, residuals, masks)


def _of_different_sizes(
    layer: _BatchNorm, inputs: list[Tensor], residuals: list[Tensor | None], masks: list[Tensor | None]
) -> tuple[Tensor, ...]:
    """Inputs of different spatial sizes, joined as rows (positions, C): moments do not depend on the arrangement."""
    if layer.statistics is not None and not isinstance(layer.statistics, (Sync, Renorm, Population)):
        raise ValueError(f"micro-batches of different sizes cannot be joined for {layer.statistics!r}")
    if isinstance(layer.num_features, tuple):
        raise ValueError(
            "micro-batches of different sizes cannot be joined where each activation has its own statistics"
        )
    for x, residual in zip(inputs, residuals, strict=True):
        layer._check_input_dim(x)
        if residual is not None:
            check_residual(residual, x)
    rows = [
        _cat([None if value is None else _rows(value) for value in values])
        for values in (inputs, residuals, masks)
    ]
    assert rows[0] is not None
    output = layer._normalised(rows[0], rows[1], rows[2], *layer._affine())
    parts = output.split([x.numel() // x.size(1) for x in inputs])
    return tuple(
        part.reshape(x.size(0), *x.shape[2:], x.size(1)).movedim(-1, 1).clone()
        for part, x in zip(parts, inputs, strict=True)
    )


def _rows(x: Tensor) -> Tensor:
    """(N, C, *S) as (N·|S|, C)."""
    return x.movedim(1, -1).flatten(0, -2)


def _cat(values: list[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return torch.cat(present) if present else None
