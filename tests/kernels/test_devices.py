"""Addresses leave torch's hands here, so what is not in this machine's memory must be refused before."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.kernels import choice
from tests.kernels.processes import said

pytestmark = pytest.mark.skipif(not choice.built(), reason="installed without native kernels")

X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _native():
    with choice.use("native"):
        yield


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_on_another_device_is_an_error(name, training):
    given: dict[str, Any] = {name: torch.full((3,), 2.0, device="meta")}
    with pytest.raises(RuntimeError, match="device"):
        bn.batch_norm(X, torch.zeros(3), torch.ones(3), **given, training=training)


# In a process of its own: an address that is not one would end this one.
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_on_another_device_are_an_error(training):
    code = f"""
    import torch, batchnorm as bn
    running = [torch.zeros(3, device="meta"), torch.ones(3, device="meta")]
    try:
        bn.batch_norm(torch.randn(4, 3, 5), *running, training={training})
    except RuntimeError as error:
        print("device" in str(error))
    """
    assert said(code, "native") == "True"


@pytest.mark.parametrize("shape", ["(4, 3, 5)", "(5, 3, 4)).transpose(0, 2"])
def test_torch_s_default_device_is_not_where_the_results_go(shape):
    # an accelerator, in a program that also runs a model on the CPU
    code = f"""
    import torch, batchnorm as bn
    layer, x = bn.BatchNorm1d(3), torch.randn({shape}).requires_grad_()
    expected = torch.autograd.grad(layer(x).sin().sum(), x)[0]
    torch.set_default_device("meta")
    torch.testing.assert_close(torch.autograd.grad(layer(x).sin().sum(), x)[0], expected)
    torch.testing.assert_close(layer.eval()(x).isfinite().all().item(), True)
    print("done")
    """
    assert said(code, "native") == "done"


def test_a_parameter_that_is_more_than_its_memory_is_asked_for_its_values():
    from torch.testing._internal.two_tensor import TwoTensor

    weight = TwoTensor(torch.full((3,), 2.0), torch.full((3,), 2.0))
    y = bn.batch_norm(X, None, None, weight, training=True)
    plain = y.a if isinstance(y, TwoTensor) else y
    assert_close(plain, bn.batch_norm(X, None, None, torch.full((3,), 2.0), training=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_a_parameter_that_is_no_real_number_is_torch_s_error(dtype):
    with pytest.raises(RuntimeError):
        bn.batch_norm(X, None, None, torch.ones(3).to(dtype), training=True)


# --- lazy views, whose memory does not hold their values


def test_an_input_negated_lazily():
    x = torch._neg_view(X.clone())
    assert x.is_neg()
    assert_close(bn.batch_norm(x, None, None, training=True), bn.batch_norm(-X, None, None, training=True))


def test_a_parameter_negated_lazily():
    weight = torch._neg_view(torch.ones(3))
    y = bn.batch_norm(X, None, None, weight, training=True)
    assert_close(y, -bn.batch_norm(X, None, None, training=True))


def test_a_gradient_negated_lazily():
    # that of the imaginary part of a conjugate
    x, g = torch.randn(9, 1, requires_grad=True), torch.randn(9, 1, dtype=torch.complex64)
    gradients = []
    for function in (bn.batch_norm, torch.nn.functional.batch_norm):
        y = function(x, None, None, training=True)
        product = torch.complex(torch.zeros_like(y), y).conj() * g
        gradients.append(torch.autograd.grad(product.real.sum(), x)[0])
    assert_close(*gradients)
