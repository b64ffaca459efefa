"""The native kernels as one node of the autograd graph, which saves x and 2·C numbers for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import operators, recipes, stepwise
from batchnorm.kernels.backward_graph import backward_as_graph
from batchnorm.kernels.call import NOT_FUSED, Call
from batchnorm.kernels.observers import needs_dispatcher
from batchnorm.kernels.stepwise import kernels_of


# forward(ctx, ...) and not setup_context, which costs 60 µs a call
class Normalise(torch.autograd.Function):
    """stepwise.forward or native.forward, differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
    ) -> Tensor:
        """y = activation(bn(x) + residual); fills in what `call` says that the kernels set."""
        y = (stepwise.forward if call.stepwise else kernels_of(call).forward)(x, weight, bias, residual, call)
        recording = recipes.active()
        if recording is not None:
            _note(recording, y, x, weight, bias, residual, call)
        ctx.call = call
        if residual is None or call.fused == NOT_FUSED:
            ctx.save_for_backward(x, weight, bias)
        else:  # what the activation was given cannot be computed again from x; y tells as much
            ctx.save_for_backward(x, weight, bias, residual, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight, bias and residual."""
        call: Call = ctx.call
        x, weight, bias, *rest = ctx.saved_tensors
        residual, y = rest or (None, None)
        needed = ctx.needs_input_grad
        # a gradient of this gradient is asked for, or dy is a batch of gradients under vmap
        if torch.is_grad_enabled() or not torch._C._has_storage(dy):
            return *backward_as_graph(dy, x, weight, bias, residual, call, needed), None
        if call.stepwise:
            gradients = stepwise.backward(dy, x, y, weight, bias, call, needed)
        elif needs_dispatcher(dy):
            gradients = operators.backward(dy, x, y, weight, bias, call)
        else:
            gradients = kernels_of(call).backward(dy, x, y, weight, bias, call)
        dx, dweight, dbias, dresidual = gradients
        return (
            dx if needed[0] else None,
            dweight if needed[1] else None,
            dbias if needed[2] else None,
            None if not needed[3] else dy if dresidual is None else dresidual,
            None,
        )


def _note(
    recording: recipes.Recording,
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    call: Call,
) -> None:
    """Note that `y` can be made again from x, residual and the moments that were found, by the same kernel."""
    # copies: an optimizer's step, or a framework that frees gathered parameters, would change them
    weight, bias = (None if values is None else values.detach().clone() for values in (weight, bias))
    eps, fused, group = call.eps, call.fused, call.group
    stats, known, kernels = call.stats, call.statistics, kernels_of(call)

    def make(x: Tensor, residual: Tensor | None = None) -> Tensor:
        again = Call(False, eps, group=group)
        again.fused = fused
        again.stats, again.statistics = stats, known
        return kernels.forward(x, weight, bias, residual, again)

    recording.add(y, make, [recording.source(each) for each in (x, residual) if each is not None])
