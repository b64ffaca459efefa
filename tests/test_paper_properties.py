"""What Ioffe & Szegedy (2015) say of batch normalization, in numbers."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from batchnorm import BatchNorm1d, BatchNorm2d, batch_norm

A = [0.01, 0.5, 3.0, 1e3]


def float64(*shape):
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def normalised(x, eps=0.0):
    # Section 3.3's equalities are exact where eps is 0; the smallest that training takes is beyond float64's digits.
    return batch_norm(x, None, None, training=True, eps=max(eps, 1e-300))


def with_gradients(weight, u):
    """BN(Wu), and the gradients with respect to W and u of a loss on it."""
    y = normalised(u @ weight.T)
    return y, *torch.autograd.grad((y * torch.arange(y.numel()).reshape(y.shape).sin()).sum(), [weight, u])


@pytest.mark.parametrize("a", A)
def test_the_scale_of_the_weights_does_not_matter(a):
    # Section 3.3: BN((aW)u) = BN(Wu), ∂/∂u is the same, and ∂/∂(aW) = 1/a · ∂/∂W
    weight, u = float64(4, 6), float64(10, 6)
    y, dweight, du = with_gradients(weight, u)
    y_a, dweight_a, du_a = with_gradients((a * weight).detach().requires_grad_(), u)
    assert_close(y_a, y)
    assert_close(du_a, du)
    assert_close(dweight_a * a, dweight)


@pytest.mark.parametrize(
    ("before", "norm", "shape"),
    [
        (nn.Linear(6, 3), BatchNorm1d(3), (10, 6)),
        (nn.Conv2d(2, 3, 3), BatchNorm2d(3), (4, 2, 5, 5)),
    ],
    ids=["linear", "convolution"],
)
def test_a_bias_before_it_has_no_effect_and_no_gradient(before, norm, shape):
    # Section 3.2: "the bias b can be ignored since its effect will be canceled by the subsequent mean subtraction"
    model, x = nn.Sequential(before, norm).double(), float64(*shape)
    y = model(x)
    y.exp().sum().backward()
    assert_close(before.bias.grad, torch.zeros(3).double(), rtol=0, atol=1e-12)
    assert before.weight.grad.abs().max() > 1e-3  # and not because nothing flows
    before.bias.data += 100
    assert_close(model(x), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eps", [1e-5, 1e-2, 1.0])
@pytest.mark.parametrize("shape", [(10, 3), (4, 3, 5, 5)])
def test_activations_have_mean_0_and_nearly_variance_1(shape, eps):
    # Algorithm 1: Σ x̂ = 0 and 1/m Σ x̂² = σ² / (σ² + eps), "as we neglect eps" 1
    x = float64(*shape) * 0.3 + 7
    dims = [0, *range(2, x.dim())]
    x_hat, variance = normalised(x, eps), x.var(dims, correction=0)
    assert_close(x_hat.mean(dims), torch.zeros(3).double(), rtol=0, atol=1e-12)
    assert_close(x_hat.square().mean(dims), variance / (variance + eps))


def test_weight_and_bias_are_the_output_s_deviation_and_mean():
    # Algorithm 1's last line: y = γ·x̂ + β
    weight, bias = float64(3), float64(3)
    y = batch_norm(float64(4, 3, 5), None, None, weight, bias, training=True, eps=1e-300)
    assert_close(y.mean((0, 2)), bias)
    assert_close(y.std((0, 2), correction=0), weight.abs())


def test_setting_weight_and_bias_can_recover_the_input():
    # Section 3: "by setting γ = √Var[x] and β = E[x], we could recover the original activations"
    x = float64(8, 3)
    y = batch_norm(x, None, None, x.std(0, correction=0), x.mean(0), training=True, eps=1e-300)
    assert_close(y, x)


@pytest.mark.parametrize("direction", ["constant", "x_hat"])
def test_the_gradient_is_orthogonal_to_what_normalising_removes(direction):
    # BN(x + c) = BN(x) and BN(a·x) = BN(x): no first-order change along constants, nor (with eps 0) along x̂
    x = float64(4, 3, 5, 5)
    x_hat = normalised(x)
    (gradient,) = torch.autograd.grad(x_hat.exp().sum(), x)
    along = torch.ones_like(x) if direction == "constant" else x_hat.detach()
    cosine = (gradient * along).sum((0, 2, 3)) / (gradient.norm() * along.norm())
    assert_close(cosine, torch.zeros(3).double(), rtol=0, atol=1e-14)


def test_a_training_step_depends_on_the_whole_mini_batch():
    # Section 3.4: a sample's output is no function of that sample alone; in inference it is
    layer, x = BatchNorm1d(3), torch.randn(8, 3)
    assert not torch.allclose(layer(x)[:2], layer(x[:4])[:2])
    layer.eval()
    assert_close(layer(x)[:2], layer(x[:2]), rtol=0, atol=0)
