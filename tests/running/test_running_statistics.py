"""Running statistics in closed form after n steps: what they are, not that they moved."""

import pytest
import torch
from torch.testing import assert_close

from batchnorm import BatchNorm1d, BatchNorm2d

SIZES = [4, 7, 2, 30, 5]  # batches of varying size: each has its own Bessel factor


def batches(sizes=SIZES, shape=(3, 2, 5)):
    """Float64 batches (N, *shape) whose mean and spread wander."""
    return [(1 + k) * torch.randn(n, *shape, dtype=torch.float64) + 10 * k for k, n in enumerate(sizes)]


def statistics(x):
    """Mean and unbiased variance of each channel, by their definition."""
    values = x.movedim(1, 0).flatten(1)
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().sum(1) / (values.size(1) - 1)


def running(layer):
    return [layer.get_buffer("running_mean"), layer.get_buffer("running_var")]


def trained(layer, xs):
    for x in xs:
        layer(x)
    return running(layer)


@pytest.mark.parametrize("steps", range(len(SIZES) + 1))
@pytest.mark.parametrize("momentum", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_the_moving_average_in_closed_form(momentum, steps):
    xs = batches()[:steps]
    layer = BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    start = [buffer.fill_(value).clone() for buffer, value in zip(running(layer), (2.0, 5.0), strict=True)]
    found = trained(layer, xs)
    # (1 - m)ⁿ·start + Σₖ m·(1 - m)ⁿ⁻ᵏ·batchₖ
    weights = [momentum * (1 - momentum) ** (steps - k) for k in range(1, steps + 1)]
    expected = [
        (1 - momentum) ** steps * initial
        + sum(w * statistics(x)[i] for w, x in zip(weights, xs, strict=True))
        for i, initial in enumerate(start)
    ]
    assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert layer.num_batches_tracked == steps


@pytest.mark.parametrize("steps", range(1, len(SIZES) + 1))
def test_the_cumulative_average_in_closed_form(steps):
    xs = batches()[:steps]
    layer = BatchNorm2d(3, momentum=None, dtype=torch.float64)
    running(layer)[0].fill_(2.0)  # forgotten by the first batch
    found = trained(layer, xs)
    expected = [torch.stack(values).mean(0) for values in zip(*map(statistics, xs), strict=True)]
    assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_the_running_variance_of_two_values_is_unbiased(shape):
    # The factor n / (n - 1) is largest, 2, where the whole batch is two values.
    layer = BatchNorm1d(3, momentum=1.0, dtype=torch.float64)
    x = torch.tensor([1.0, 3.0]).double().reshape(2, 1).expand(2, 3)
    layer(x)
    assert_close(layer.running_var, torch.full((3,), 2.0).double())


def test_evaluation_uses_them_and_leaves_them():
    layer = BatchNorm2d(3, dtype=torch.float64)
    mean, var = (t.clone() for t in trained(layer, batches()))
    (x,) = batches([6])
    expected = (x - mean.reshape(3, 1, 1)) / (var.reshape(3, 1, 1) + layer.eps).sqrt()
    assert_close(layer.eval()(x), expected)
    assert_close(running(layer), [mean, var], rtol=0, atol=0)
    assert layer.num_batches_tracked == len(SIZES)


def test_training_does_not_use_them():
    layer = BatchNorm2d(3, dtype=torch.float64)
    (x,) = batches([6])
    first = layer(x)
    trained(layer, batches())
    assert_close(layer(x), first, rtol=0, atol=0)


def test_reset():
    layer = BatchNorm2d(3)
    trained(layer, [x.float() for x in batches()])
    layer.reset_running_stats()
    assert_close(running(layer), [torch.zeros(3), torch.ones(3)], rtol=0, atol=0)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("momentum", [0.1, None])
def test_they_are_no_narrower_than_float32_for_half_types(momentum):
    # In bfloat16 itself a mean of 100 is never reached: 1/10 of a step from 96 rounds back to 96.
    layer = BatchNorm1d(3, momentum=momentum).bfloat16()
    x = (100 + torch.randn(64, 3)).bfloat16()
    mean, var = trained(layer, [x] * 200)
    expected = statistics(x.double())
    assert mean.dtype == var.dtype == torch.float32
    assert_close([mean.double(), var.double()], list(expected), rtol=1e-6, atol=0)
