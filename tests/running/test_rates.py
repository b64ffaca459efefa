"""How fast running statistics follow, debiased or not, and what one value per channel does to them."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from tests.constructors import each_layer

SIZES = [4, 7, 2, 9]


def batches(sizes=SIZES):
    """Float64 batches (N, 3, 5) whose mean and spread wander."""
    return [(1 + k) * torch.randn(n, 3, 5, dtype=torch.float64) + 10 * k for k, n in enumerate(sizes)]


def of(x):
    """Mean and unbiased variance of each channel."""
    var, mean = torch.var_mean(x.movedim(1, 0).flatten(1), 1)
    return mean, var


def running(layer):
    return [layer.get_buffer("running_mean"), layer.get_buffer("running_var")]


def unlike_a_new_one(layer):
    for buffer, value in zip(running(layer), (-70.0, 500.0), strict=True):
        buffer.fill_(value)
    return layer


def weighted(weights, values):
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("steps", range(1, len(SIZES) + 1))
@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5, 1.0])
def test_the_debiased_average_is_of_the_batches_alone(momentum, steps):
    xs = batches()[:steps]
    layer = unlike_a_new_one(bn.BatchNorm1d(3, momentum=momentum, debiased=True, dtype=torch.float64))
    for x in xs:
        layer(x)
    # Σₖ m·(1 - m)ⁿ⁻ᵏ·batchₖ / (1 - (1 - m)ⁿ), whose denominator is the sum of the weights
    weights = [momentum * (1 - momentum) ** (steps - k) for k in range(1, steps + 1)]
    assert sum(weights) == pytest.approx(1 - (1 - momentum) ** steps, rel=1e-12)
    expected = [weighted(weights, values) for values in zip(*map(of, xs), strict=True)]
    assert_close(running(layer), expected, rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == steps


def test_it_is_the_plain_average_divided_by_what_the_batches_weigh():
    # the bias correction of Adam, taken from torch's own layer which starts at 0
    plain = nn.BatchNorm1d(3, momentum=0.2, dtype=torch.float64)
    plain.get_buffer("running_var").zero_()
    layer = bn.BatchNorm1d(3, momentum=0.2, debiased=True, dtype=torch.float64)
    for n, x in enumerate(batches(), start=1):
        plain(x)
        layer(x)
        expected = [values / (1 - 0.8**n) for values in running(plain)]
        assert_close(running(layer), expected, rtol=1e-12, atol=1e-12)


def test_debiased_momentum_0_stays_where_it_began():
    layer = unlike_a_new_one(bn.BatchNorm1d(3, momentum=0, debiased=True))
    before = copy.deepcopy(running(layer))
    for x in batches():
        layer(x.float())
    assert_close(running(layer), before, rtol=0, atol=0)
    assert layer.num_batches_tracked == len(SIZES)


def test_debiased_momentum_none_is_the_cumulative_average():
    xs = batches()
    layers = [bn.BatchNorm1d(3, momentum=None, debiased=d, dtype=torch.float64) for d in (True, False)]
    for layer in layers:
        unlike_a_new_one(layer)
        for x in xs:
            layer(x)
        expected = [torch.stack(values).mean(0) for values in zip(*map(of, xs), strict=True)]
        assert_close(running(layer), expected, rtol=1e-12, atol=1e-12)


def test_debiased_without_statistics_is_a_plain_layer():
    (x,) = batches([6])
    layer = bn.BatchNorm1d(3, debiased=True, track_running_stats=False, dtype=torch.float64)
    assert_close(layer(x), nn.BatchNorm1d(3, dtype=torch.float64)(x))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_restored_layer_goes_on_exactly(momentum):
    xs = batches()
    layer = bn.BatchNorm1d(3, momentum=momentum, debiased=True, dtype=torch.float64)
    for x in xs[:2]:
        layer(x)
    restored = bn.BatchNorm1d(3, momentum=momentum, debiased=True, dtype=torch.float64)
    restored.load_state_dict(copy.deepcopy(layer.state_dict()))
    for x in xs[2:]:
        layer(x)
        restored(x)
    assert_close(restored.state_dict(), layer.state_dict(), rtol=0, atol=0)


def test_a_reset_layer_begins_anew():
    first, last = batches([5, 6])
    layer = bn.BatchNorm1d(3, debiased=True, dtype=torch.float64)
    layer(first)
    layer.reset_running_stats()
    layer(last)
    assert_close(running(layer), list(of(last)), rtol=1e-12, atol=1e-12)


def test_a_batch_that_is_skipped_is_not_one_of_the_batches():
    first, last = batches([5, 6])
    layer = bn.BatchNorm1d(3, momentum=0.5, debiased=True, dtype=torch.float64)
    layer(first)
    with pytest.warns(RuntimeWarning, match="inf or nan"):
        layer(torch.full((4, 3, 5), torch.inf, dtype=torch.float64))
    layer(last)
    expected = [weighted([0.25, 0.5], values) for values in zip(of(first), of(last), strict=True)]
    assert_close(running(layer), expected, rtol=1e-12, atol=1e-12)


def single(shape):
    return torch.randn(1, 3, *[1] * (len(shape) - 2))


@each_layer
def test_one_value_takes_the_running_statistics_and_moves_nothing(ours, torch_s, shape):
    layer, theirs = ours(3, on_single="running"), torch_s(3)
    for each in (layer, theirs):
        torch.manual_seed(1)
        each(3 + 2 * torch.randn(shape))
    before = copy.deepcopy(layer.state_dict())
    x = single(shape).requires_grad_()
    y = x.detach().clone().requires_grad_()
    out = layer(x)
    expected = theirs.eval()(y)  # evaluation's output and gradients
    assert_close(out, expected)
    assert layer.training
    dy = torch.randn_like(out)
    out.backward(dy)
    expected.backward(dy)
    assert_close(x.grad, y.grad)
    assert_close([p.grad for p in layer.parameters()], [p.grad for p in theirs.parameters()])
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer(torch.randn(shape))  # and the next batch enters again
    assert layer.num_batches_tracked == 2


@each_layer
@pytest.mark.parametrize("options", [{}, {"on_single": "raise"}], ids=str)
def test_one_value_raises_as_torchs_layer_does(ours, torch_s, shape, options):
    x = single(shape)
    layer = ours(3, **options)
    before = copy.deepcopy(layer.state_dict())
    messages = []
    for each in (torch_s(3), layer):
        with pytest.raises(
            ValueError, match="Expected more than 1 value per channel when training"
        ) as raised:
            each(x)
        messages.append(str(raised.value))
    assert messages[1].startswith(messages[0])
    assert "on_single" in messages[1]
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"eps": 0.1}], ids=str)
def test_on_single_changes_nothing_where_there_is_nothing_to_take(options):
    layer = bn.BatchNorm1d(3, on_single="running", **options)
    x = torch.randn(6, 3)
    assert_close(layer(x), nn.BatchNorm1d(3, **options)(x))
    if "track_running_stats" in options:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(x[:1])


def test_on_single_hides_no_other_error():
    layer = bn.BatchNorm1d(3, on_single="running")
    with pytest.raises(RuntimeError, match="contain 4 elements not 3"):
        layer(torch.randn(1, 4))
    with pytest.raises(ValueError, match="the residual has shape"):
        layer(torch.randn(1, 3), torch.randn(2, 3))


def test_one_value_with_activation_and_residual():
    layer = bn.BatchNorm1d(3, on_single="running", activation="relu")
    layer(torch.randn(8, 3))
    x, residual = torch.randn(1, 3), torch.randn(1, 3)
    assert_close(layer(x, residual), layer.eval()(x, residual), rtol=0, atol=0)


def test_one_value_per_ghost_batch():
    layer = bn.BatchNorm1d(3, on_single="running", statistics=bn.Ghost(1))
    x = torch.randn(4, 3)
    expected = copy.deepcopy(layer).eval()(x)
    assert_close(layer(x), expected)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("wrong", ["skip", None, True, ""])
def test_another_on_single_is_an_error(wrong):
    with pytest.raises(ValueError, match="on_single"):
        bn.BatchNorm1d(3, on_single=wrong)


@pytest.mark.parametrize("wrong", ["ghost", bn.Ghost, 4, torch.nn.Identity()], ids=repr)
def test_other_statistics_are_an_error(wrong):
    with pytest.raises(TypeError, match="statistics"):
        bn.BatchNorm2d(3, statistics=wrong)


def test_a_layer_shows_what_is_set():
    assert repr(bn.BatchNorm1d(3)) == repr(nn.BatchNorm1d(3))
    shown = repr(bn.BatchNorm2d(3, statistics=bn.Ghost(4), debiased=True, on_single="running"))
    assert shown.endswith(", statistics=Ghost(size=4), debiased=True, on_single='running')")
