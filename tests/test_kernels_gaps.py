"""Activations that look like a fused one, parameters that lie apart, buffers and graphs of each way to a kernel."""

import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn


def float64(*shape):
    return torch.randn(shape, dtype=torch.float64)


def running():
    return torch.tensor([0.5, -1.0, 0.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()


class Watching(TorchDispatchMode):
    """Sees every operator, and lets it be."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_watched_it_has_gradients_of_second_order(training):
    def function(x, weight, bias):
        mean, var = running()
        return bn.batch_norm(x, mean, var, weight, bias, training)

    with Watching():
        assert gradgradcheck(function, [float64(*shape).requires_grad_() for shape in ((4, 3), (3,), (3,))])


@pytest.mark.parametrize("way", [lambda: bn.kernels.use("torch"), Watching], ids=["torch's", "watched"])
def test_a_later_batch_leaves_the_gradient_of_an_evaluation_alone(way):
    x, (mean, var) = float64(4, 3).requires_grad_(), running()
    with way():
        y = bn.batch_norm(x, mean, var)
        bn.batch_norm(float64(8, 3), mean, var, training=True)
        y.sum().backward()
    assert_close(x.grad, (1 / (running()[1] + 1e-5).sqrt()).expand(4, 3))


class OwnReLU(nn.ReLU):
    def forward(self, input):
        return input.relu() + 1


@pytest.mark.parametrize("module", [OwnReLU(), nn.LeakyReLU(-0.5)], ids=["a subclass", "a negative slope"])
def test_an_activation_that_is_not_quite_a_known_one_is_called(module):
    tensors = float64(8, 3), float64(8, 3)

    def outcome(before, after):
        x, residual = (t.clone().requires_grad_() for t in tensors)
        y = after(bn.batch_norm(x, None, None, training=True, activation=before, residual=residual))
        return y, torch.autograd.grad(y.sin().sum(), [x, residual])

    assert_close(outcome(module, lambda y: y), outcome(None, module))


@pytest.mark.parametrize("training", [True, False])
def test_parameters_may_lie_apart(training):
    x, weight, bias = float64(4, 3), float64(6)[::2], float64(6)[::2]
    mean, var = running()
    found = bn.batch_norm(x, mean, var, weight, bias, training)
    mean, var = running()
    together = bn.batch_norm(x, mean, var, weight.contiguous(), bias.contiguous(), training)
    assert_close(found, together, rtol=0, atol=0)
