"""What only a wrong choice of kernels, a graph or a layer of somebody else's making brings to light."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
from batchnorm.kernels import choice
from tests.test_layers import exactly


def float64(*shape):
    return torch.randn(shape, dtype=torch.float64)


def running():
    return torch.tensor([0.5, -1.0, 0.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()


# --- the choice


@pytest.mark.parametrize("name", choice.NAMES)
def test_a_process_starts_with_the_kernels_it_is_told(name, monkeypatch):
    if name == "native" and not choice.built():
        pytest.skip("without native kernels")
    monkeypatch.setenv("BATCHNORM_KERNELS", name)
    asks = [sys.executable, "-c", "import batchnorm; print(batchnorm.kernels.active())"]
    assert subprocess.run(asks, capture_output=True, text=True).stdout.split() == [name]


def test_without_native_kernels_it_warns_once(monkeypatch):
    monkeypatch.delenv("BATCHNORM_KERNELS", raising=False)
    monkeypatch.setattr(choice, "built", lambda: False)
    monkeypatch.setattr(choice, "_chosen", None)
    with pytest.warns(RuntimeWarning, match="without its native kernels"):
        assert choice.active() == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.active() == "torch"


def test_a_block_gives_back_what_was_chosen_before(monkeypatch):
    monkeypatch.setattr(choice, "_chosen", None)
    with bn.kernels.use("reference"):
        with bn.kernels.use("torch"):
            assert bn.kernels.active() == "torch"
        assert bn.kernels.active() == "reference"


# --- graphs


def test_autograd_is_told_that_the_buffers_moved():
    layer, x = bn.BatchNorm1d(3), torch.randn(4, 3)
    weight = torch.ones(3, requires_grad=True)
    products = [
        weight * buffer for buffer in (layer.get_buffer("running_mean"), layer.get_buffer("running_var"))
    ]
    layer(x)
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_that_will_be_differentiated_are_the_same(activation):
    tensors = [float64(4, 3).requires_grad_() for _ in range(2)]

    def gradients(**options):
        x, residual = tensors
        y = bn.batch_norm(x, None, None, training=True, activation=activation, residual=residual)
        return torch.autograd.grad(y.sin().sum(), tensors, **options)

    assert_close(gradients(create_graph=True), gradients())


@pytest.mark.parametrize("activation", [None, "relu"])
def test_compiled_a_residual_has_its_gradient(activation):
    def gradients(call):
        x, residual = (t.clone().requires_grad_() for t in tensors)
        y = call(x, None, None, training=True, activation=activation, residual=residual)
        return torch.autograd.grad(y.sin().sum(), [x, residual])

    tensors = float64(4, 3), float64(4, 3)
    compiled = torch.compile(bn.batch_norm, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled), gradients(bn.batch_norm))


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


def test_watched_it_keeps_no_buffer_for_the_backward_pass():
    x, (mean, var) = float64(4, 3).requires_grad_(), running()
    with Watching():
        y = bn.batch_norm(x, mean, var)
        bn.batch_norm(float64(8, 3), mean, var, training=True)
        y.sin().sum().backward()
    other = x.detach().requires_grad_()
    bn.batch_norm(other, *running()).sin().sum().backward()
    assert_close(x.grad, other.grad)


def test_torch_s_kernels_keep_no_buffer_for_the_backward_pass():
    x, (mean, var) = float64(4, 3).requires_grad_(), running()
    with bn.kernels.use("torch"):
        y = bn.batch_norm(x, mean, var)
        bn.batch_norm(float64(8, 3), mean, var, training=True)
        y.sum().backward()
    assert_close(x.grad, (1 / (running()[1] + 1e-5).sqrt()).expand(4, 3))


# --- what is fused, and what it is given


def hooked_before():
    module = nn.ReLU()
    module.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    return module


def hooked_after():
    module = nn.ReLU()
    module.register_forward_hook(lambda module, given, output: output + 1)
    return module


class OwnReLU(nn.ReLU):
    def forward(self, input):
        return input.relu() + 1


@pytest.mark.parametrize(
    "module",
    [hooked_before(), hooked_after(), OwnReLU(), nn.LeakyReLU(-0.5)],
    ids=["a hook before", "a hook after", "a subclass", "a negative slope"],
)
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
    exactly(found, bn.batch_norm(x, mean, var, weight.contiguous(), bias.contiguous(), training))
