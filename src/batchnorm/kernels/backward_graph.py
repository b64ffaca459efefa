"""The backward pass as a graph of torch's operations, where a gradient of its gradients is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.kernels.call import Call

Gradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None
]  # of x, weight, bias and residual


def select_needed(needed: tuple[bool, ...], values: Gradients) -> Gradients:
    """`values` with None for those that are not needed."""
    x, weight, bias, residual = values
    return (
        x if needed[0] else None,
        weight if needed[1] else None,
        bias if needed[2] else None,
        residual if needed[3] else None,
    )


def backward_as_graph(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    call: Call,
    needed: tuple[bool, ...],
) -> Gradients:
    """The gradients that are needed, differentiable.

    residual: None where none was added before an activation; then dy is its gradient.
    """
    with torch.enable_grad():
        y, _ = reference.batch_norm(x, weight, bias, call)
        number, slope = call.fused
        y = reference.activate(y, _ACTIVATIONS[number](slope), residual)
        inputs = select_needed(needed, (x, weight, bias, residual))
        differentiated = [value for value in inputs if value is not None]
        found = iter(torch.autograd.grad(y, differentiated, dy, create_graph=True) if differentiated else ())
    dx, dweight, dbias, dresidual = (None if value is None else next(found) for value in inputs)
    return dx, dweight, dbias, dy if residual is None and needed[3] else dresidual


_ACTIVATIONS = (
    lambda _: None,
    lambda _: torch.relu,
    lambda slope: lambda y: torch.nn.functional.leaky_relu(y, slope),
    lambda _: torch.nn.functional.relu6,
)
