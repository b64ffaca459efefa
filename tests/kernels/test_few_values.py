"""Inputs whose terms are all rounded alike: few distinct values, sorted or alternating ones, a far mean, an outlier."""

import pytest
import torch
from torch.nn import functional as F

import batchnorm as bn


def normal(shape):
    return torch.randn(shape)


def alternating(shape):
    return torch.where(torch.arange(torch.Size(shape).numel()) % 2 == 0, 0.3, -0.3).reshape(shape)


def outlier(shape, place=0.5):
    x = torch.randn(shape)
    x.view(-1)[int(place * x.numel())] = 1e4
    return x


FAMILY = {
    "constant": lambda shape: torch.full(shape, 3.7),
    "0 and 1": lambda shape: (torch.rand(shape) < 0.5).float(),
    "rarely 1": lambda shape: (torch.rand(shape) < 0.02).float(),
    "two values": lambda shape: torch.where(torch.rand(shape) < 0.3, 0.1, 0.7),
    "three values": lambda shape: torch.randint(0, 3, shape) * 0.3,
    "integers": lambda shape: (normal(shape) * 4).round(),
    "counts": lambda shape: (normal(shape) * 4).round().relu(),
    "pixels": lambda shape: (torch.rand(shape) * 255).floor() / 255,
    "sorted": lambda shape: normal(shape).flatten().sort().values.reshape(shape),
    "a ramp": lambda shape: torch.arange(torch.Size(shape).numel()).float().reshape(shape),
    "an outlier": outlier,
    "an outlier first": lambda shape: outlier(shape, 0),
    "alternating": alternating,
    "alternating about 0.1": lambda shape: alternating(shape) + 0.1,
    "a mean of 1e4": lambda shape: normal(shape) + 1e4,
    "0 and 1 about 1e4": lambda shape: (torch.rand(shape) < 0.5) + 1e4,
    "integers about -1e4": lambda shape: (normal(shape) * 4).round() - 1e4,
}
SHAPES = [
    (8, 1, 13, 8, 31),
    (16, 3, 48, 64),
    (64, 40, 14, 14),
    (128, 16, 7, 7),
    (4096, 33),
    (2, 2, 4001),
    (1, 1, 9973),
]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


CASES = [
    (shape, layout)
    for shape in SHAPES
    for layout in ("contiguous", "channels last")[: 2 if len(shape) in FORMATS else 1]
]


def step(function, x, dy):
    x = x.clone().requires_grad_()
    y = function(x, None, None, training=True)
    (dx,) = torch.autograd.grad(y, x, dy.to(x.dtype))
    return y.detach(), dx


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_no_digit_is_lost(shape, layout, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, make in FAMILY.items():
            x, dy = make(shape), torch.randn(shape)
            if layout == "channels last":
                x = x.to(memory_format=FORMATS[x.dim()])
            expected, dx = step(F.batch_norm, x.double(), dy)
            found, gradient = step(bn.batch_norm, x, dy)
            theirs, their_gradient = step(F.batch_norm, x, dy)
            scale = max(1, expected.abs().max().item())
            error, their_error = ((each - expected).abs().max().item() for each in (found, theirs))
            assert error <= 2e-7 * scale, f"{name}: {error:.1e}, at a scale of {scale:.1f}"
            assert error <= 2 * their_error + 1e-7 * scale, f"{name}: {error:.1e}, torch {their_error:.1e}"
            if name != "constant":
                error, their_error = ((each - dx).abs().max().item() for each in (gradient, their_gradient))
                assert error <= 5e-7 * dx.abs().max() + 1e-12, f"{name}: a gradient off by {error:.1e}"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", FAMILY)
def test_nor_of_sums_of_equal_gradients(name):
    """dweight and dbias of a gradient of a single value."""
    x, dy = FAMILY[name]((16, 3, 48, 64)), torch.full((16, 3, 48, 64), 0.1)
    found = []
    for dtype in (torch.float32, torch.float64):
        weight, bias = (
            torch.ones(3, dtype=dtype, requires_grad=True),
            torch.zeros(3, dtype=dtype, requires_grad=True),
        )
        y = bn.batch_norm(x.to(dtype), None, None, weight, bias, training=True, activation="relu")
        found.append(torch.autograd.grad(y, [weight, bias], dy.to(dtype)))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:layer .* saw a batch:RuntimeWarning")
@pytest.mark.parametrize("scale", [3e19, 1e30, 1e38])
def test_squares_that_float32_cannot_hold_count_as_a_skipped_batch(scale):
    layer = bn.BatchNorm2d(3)
    before = [values.clone() for values in layer.buffers()]
    y = layer(torch.randn(8, 3, 5, 5) * scale)
    assert layer.num_batches_skipped == 1 and layer.num_batches_tracked == 0
    assert all(map(torch.equal, layer.buffers(), before))
    if scale < 1e38:
        assert not y.any()
