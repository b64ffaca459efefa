"""A batch with inf or nan shows in the output, and never enters the running statistics."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from batchnorm import BatchNorm1d, BatchNorm2d, batch_norm

BAD = [math.inf, -math.inf, math.nan]
SAYS = "inf or nan"


def trained(layer, xs):
    for x in xs:
        layer(x)
    return layer


def warm(momentum=0.1):
    """A layer that has seen three good batches, so that its statistics are something to lose."""
    return trained(BatchNorm2d(3, momentum=momentum), [good() for _ in range(3)])


def good():
    return torch.randn(4, 3, 2, 2)


def bad(value=math.nan, position=0):
    x = good()
    x.view(-1)[position] = value
    return x


def state(layer):
    return {name: t.clone() for name, t in layer.state_dict().items()}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("position", [0, 6, 23, -1])
def test_it_shows_and_does_not_enter(value, position):
    layer = warm()
    before, x = state(layer), bad(value, position)
    with pytest.warns(RuntimeWarning, match=SAYS):
        y = layer(x)
    channel = x.isfinite().logical_not().any(0).flatten(1).any(1)
    assert channel.sum() == 1
    assert y[:, channel].isnan().any()
    assert y[:, ~channel].isfinite().all()
    assert_close(state(layer), before, rtol=0, atol=0)  # num_batches_tracked too
    assert layer.num_batches_skipped == 1


def test_the_function_skips_it_too():
    mean, var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    assert batch_norm(bad(), mean, var, training=True).isnan().any()
    assert mean.tolist() == [1, 2, 3]
    assert var.tolist() == [4, 5, 6]


@pytest.mark.parametrize("x", [
    pytest.param((good() * 1e5).half(), id="float16 overflowed before the layer"),
    pytest.param(good() * 1e30, id="squares beyond float32"),
    pytest.param(good().double() * 1e25, id="a float64 variance beyond the buffers' float32"),
])  # fmt: skip
def test_what_overflows_does_not_enter(x):
    layer = warm()
    before = state(layer)
    with pytest.warns(RuntimeWarning, match=SAYS):
        layer(x)
    assert_close(state(layer), before, rtol=0, atol=0)


def test_large_float16_values_that_fit_do_enter():
    # Their squares are far beyond float16, in which nothing is summed.
    layer = BatchNorm2d(3, momentum=1.0).half()
    x = (good() * 1e4).half()
    layer(x)
    assert_close(layer.running_var, x.double().var((0, 2, 3)).float())


def test_one_warning_and_every_batch_counted():
    layer = warm()
    with pytest.warns(RuntimeWarning, match=SAYS) as caught:
        trained(layer, [bad(value) for value in BAD])
    assert len(caught) == 1
    assert "num_batches_skipped" in str(caught[0].message)
    assert layer.num_batches_skipped == 3


def test_the_warning_names_the_layer_by_its_path_in_the_model():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 3, 1)
            self.norm = BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.first(x))

    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.ModuleDict({"block": Block()})["block"])
    with pytest.warns(RuntimeWarning, match=r"'1\.norm': BatchNorm2d\(3, "):
        model(bad())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_goes_on_as_if_the_batch_had_not_been(momentum):
    disturbed, undisturbed = (warm(momentum) for _ in range(2))
    disturbed.load_state_dict(undisturbed.state_dict())
    with pytest.warns(RuntimeWarning, match=SAYS):
        disturbed(bad())
    for x in [good() for _ in range(3)]:
        assert_close(disturbed(x), undisturbed(x), rtol=0, atol=0)
    assert_close(state(disturbed), state(undisturbed), rtol=0, atol=0)
    assert_close(disturbed.eval()(x), undisturbed.eval()(x), rtol=0, atol=0)


def test_in_evaluation_nothing_is_counted():
    layer = warm().eval()
    layer(bad())
    assert layer.num_batches_skipped == 0


def test_without_running_statistics_there_is_nothing_to_protect():
    layer = BatchNorm2d(3, track_running_stats=False)
    layer(bad())
    assert layer.num_batches_skipped is None


def test_reset_forgets_them_and_warns_again():
    layer = warm()
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=SAYS):
            layer(bad())
        layer.reset_running_stats()
        assert layer.num_batches_skipped == 0


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0)])
def test_an_empty_batch_changes_nothing(shape):
    layer = BatchNorm1d(3, momentum=None)
    layer(torch.randn(8, 3))
    before = state(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer(torch.empty(shape)).shape == shape
    assert_close(state(layer), before, rtol=0, atol=0)
    assert layer.num_batches_skipped == 0
