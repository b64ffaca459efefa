"""What a graph of autograd keeps for the backward pass, and that pass as a graph: for the node and the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels import native, reference
from batchnorm.kernels.native import Fused
from batchnorm.kernels.reference import Exchange, Given


def saved_of(y: Tensor, residual: Tensor | None, activation: Fused) -> tuple[Tensor | None, Tensor | None]:
    """(residual, y) where the backward pass needs them, else None for both.

    With a residual, what the activation was given cannot be computed again from x; y tells as much.
    """
    return (None, None) if residual is None or activation == native.NONE else (residual, y)


def asked(
    needed: tuple[bool, ...],
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Of the four those that are needed, None for the others."""
    return (
        x if needed[0] else None,
        weight if needed[1] else None,
        bias if needed[2] else None,
        residual if needed[3] else None,
    )


def again(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Fused,
    given: Given | None,
    wanted: tuple[bool, ...],
    group: int = 0,
    mask: Tensor | None = None,
    exchange: Exchange | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and residual as a graph, for a gradient of these gradients is asked for.

    `residual` is None where none was added before an activation; then dy is its gradient.
    """
    with torch.enable_grad():
        y, _ = reference.batch_norm(x, weight, bias, eps, given, group, mask, exchange)
        y = reference.activate(y, _ACTIVATIONS[activation[0]](activation[1]), residual)
        inputs = asked(wanted, x, weight, bias, residual)
        asked_for = [v for v in inputs if v is not None]
        found = iter(torch.autograd.grad(y, asked_for, dy, create_graph=True) if asked_for else ())
    gradients = [None if v is None else next(found) for v in inputs]
    if residual is None and wanted[3]:
        gradients[3] = dy
    return tuple(gradients)


_ACTIVATIONS = (
    lambda _: None,
    lambda _: torch.relu,
    lambda slope: lambda y: torch.nn.functional.leaky_relu(y, slope),
    lambda _: torch.nn.functional.relu6,
)
