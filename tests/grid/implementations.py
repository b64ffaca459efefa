"""The implementations of the grid: one class each, with the same `run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

import batchnorm as bn
from batchnorm import functional
from batchnorm.kernels import reference
from batchnorm.moments import Affine
from tests.grid.problems import Problem, Tensors

Outcome = dict[str, Tensor]


class Implementation(Protocol):
    def run(self, problem: Problem, tensors: Tensors, training: bool) -> Outcome:
        """The output, the gradients of what is differentiable and the running statistics afterwards."""


class _ByAutograd:
    """What only has a forward pass of its own."""

    def forward(self, problem: Problem, tensors: Tensors, training: bool) -> Tensor:
        raise NotImplementedError

    def run(self, problem: Problem, tensors: Tensors, training: bool) -> Outcome:
        output = self.forward(problem, tensors, training)
        asked = tensors.differentiable()
        gradients = torch.autograd.grad(output, list(asked.values()), tensors.output_gradient)
        return {
            "output": output.detach(),
            **{f"gradient of {name}": gradient for name, gradient in zip(asked, gradients, strict=True)},
            "running_mean": tensors.running_mean,
            "running_var": tensors.running_var,
        }


class Torch(_ByAutograd):
    """torch's own operators; in float64 the oracle."""

    ACTIVATIONS: ClassVar[dict[str | None, Callable[[Tensor], Tensor]]] = {
        None: torch.nn.Identity(),
        "relu": torch.nn.ReLU(),
        "leaky_relu": torch.nn.LeakyReLU(),
        "relu6": torch.nn.ReLU6(),
        "silu": torch.nn.SiLU(),
        "sigmoid": torch.nn.Sigmoid(),
        "tanh": torch.nn.Tanh(),
    }

    def forward(self, problem: Problem, tensors: Tensors, training: bool) -> Tensor:
        t = tensors
        output = torch.nn.functional.batch_norm(
            t.input, t.running_mean, t.running_var, t.weight, t.bias, training, problem.momentum, problem.eps
        )
        return self.ACTIVATIONS[problem.activation](output if t.residual is None else output + t.residual)


class Function(_ByAutograd):
    def forward(self, problem: Problem, tensors: Tensors, training: bool) -> Tensor:
        t = tensors
        return bn.batch_norm(
            t.input, t.running_mean, t.running_var, t.weight, t.bias, training, problem.momentum, problem.eps,
            activation=problem.activation, residual=t.residual,
        )  # fmt: skip


class Layer(_ByAutograd):
    def forward(self, problem: Problem, tensors: Tensors, training: bool) -> Tensor:
        kind = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}
        layer = kind[tensors.input.dim()](
            problem.shape[1], problem.eps, problem.momentum, affine=False, activation=problem.activation
        )
        layer.register_parameter("weight", tensors.weight)
        layer.register_parameter("bias", tensors.bias)
        layer.running_mean, layer.running_var = tensors.running_mean, tensors.running_var
        output: Tensor = layer.train(training)(tensors.input, tensors.residual)
        return output


class Kernels:
    """The reference kernels called by hand: their own backward, where the others may leave it to autograd."""

    def run(self, problem: Problem, tensors: Tensors, training: bool) -> Outcome:
        t, gradients = tensors, {}
        moments = reference.moments(t.input.detach())
        if training:
            normalised = reference.normalise(
                t.input, reference.mean_and_variance(moments), t.weight, t.bias, problem.eps
            )
            functional.track(moments, t.running_mean, t.running_var, problem.momentum)
        else:
            running = Affine.normalising(t.running_mean, t.running_var, t.weight, t.bias, problem.eps)
            normalised = running(t.input)
        # The chain rule is cut where the kernel's own backward takes over.
        cut = normalised.detach().requires_grad_()
        total = cut if t.residual is None else cut + t.residual
        output = reference.ACTIVATIONS[problem.activation](total) if problem.activation else total
        above = {"cut": cut} if t.residual is None else {"cut": cut, "residual": t.residual}
        found = torch.autograd.grad(output, list(above.values()), t.output_gradient)
        gradients = dict(zip(above, found, strict=True))
        dy = gradients.pop("cut")
        below = {name: x for name, x in t.differentiable().items() if name != "residual"}
        if training:
            every = reference.backward(dy, t.input.detach(), moments, t.weight, problem.eps)
            by_kernel = dict(zip(("input", "weight", "bias"), every, strict=True))
            gradients |= {name: by_kernel[name].detach() for name in below}
        else:
            found = torch.autograd.grad(normalised, list(below.values()), dy)
            gradients |= dict(zip(below, found, strict=True))
        return {
            "output": output.detach(),
            **{f"gradient of {name}": gradient for name, gradient in gradients.items()},
            "running_mean": t.running_mean,
            "running_var": t.running_var,
        }


ORACLE = Torch()
IMPLEMENTATIONS: dict[str, Implementation] = {
    "function": Function(),
    "layer": Layer(),
    "kernels": Kernels(),
}
