"""A batch with inf or nan shows in the output, and never enters the running statistics."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from batchnorm import BatchNorm1d, BatchNorm2d, batch_norm
from tests.mutations.mutation import Mutation

BAD = [math.inf, -math.inf, math.nan]
SAYS = "mean or variance is inf or nan"


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


def test_finite_values_whose_variance_overflows_do_not_enter():
    # The warning must not speak of inf in the batch or the output: there is none.
    layer, x = warm(), good() * 1e20
    before = state(layer)
    assert x.isfinite().all()
    with pytest.warns(RuntimeWarning, match=SAYS):
        y = layer(x)
    assert y.isfinite().all()
    assert_close(state(layer), before, rtol=0, atol=0)
    assert layer.num_batches_skipped == 1


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("bad_value", [math.nan, math.inf, 1e30])
def test_a_skipped_batch_leaves_the_buffers_bit_for_bit(bad_value, momentum):
    # Moving them by 0 is not enough: -0.0 + 0 is 0.0, and inf moved towards itself is nan.
    layer = BatchNorm2d(3, momentum=momentum)
    layer.get_buffer("running_mean").copy_(torch.tensor([-0.0, math.inf, 1e-45]))
    layer.get_buffer("running_var").copy_(torch.tensor([math.inf, math.nan, -0.0]))
    before = {name: t.view(torch.uint8) if t.dim() else t for name, t in state(layer).items()}
    with pytest.warns(RuntimeWarning, match=SAYS):
        layer(bad(bad_value))
    for name, bits in before.items():
        after = layer.get_buffer(name) if name in layer._buffers else layer.get_parameter(name)
        assert torch.equal(after.detach().view(torch.uint8) if after.dim() else after, bits), name


def compiled(*layers):
    model = nn.Sequential(*layers)
    return model, torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, False], ids=["train()", "eval()"])
def test_compiled_code_counts_and_the_warning_comes_with_the_next_change_of_mode(mode):
    model, call = compiled(BatchNorm2d(3), nn.Sequential(nn.ReLU(), BatchNorm2d(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (good(), bad(), good(), bad()):
            call(x)
    for layer in (model[0], model[1][1]):
        assert layer.num_batches_skipped == 2
        assert layer.num_batches_tracked == 2
        assert layer.running_mean.isfinite().all()
    with pytest.warns(RuntimeWarning, match=SAYS) as caught:
        model.train(mode)
    said = [str(warning.message).split(":")[0] for warning in caught]
    assert said == ["layer '0'", "layer '1.1'"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()
        call(bad())
        model.eval().train()


@pytest.mark.slow
def test_a_warning_given_does_not_compile_again():
    model, call = compiled(BatchNorm2d(3))
    call(bad())
    with pytest.warns(RuntimeWarning, match=SAYS):
        model.train()
    with torch.compiler.set_stance("fail_on_recompile"):
        call(good())


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


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_checkpoint_forgets_them_in_place_and_warns_again(assign):
    # They are not in the checkpoint, and those of the run before say nothing of the run that is loaded.
    layer = warm()
    counter, checkpoint = layer.num_batches_skipped, nn.BatchNorm2d(3).state_dict()
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=SAYS):
            layer(bad())
        layer.load_state_dict(checkpoint, assign=assign)
        assert layer.num_batches_skipped is counter
        assert counter == 0


def test_loading_parameters_alone_does_not_forget_them():
    layer = warm()
    with pytest.warns(RuntimeWarning, match=SAYS):
        layer(bad())
    layer.load_state_dict({"weight": torch.ones(3)}, strict=False)
    assert layer.num_batches_skipped == 1


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


MUTATIONS = [
    Mutation(
        "a warning each time", "running/tracking.py",
        "if torch.compiler.is_compiling() or self._warned_of_skipped:", "if torch.compiler.is_compiling():",
        "a hundred equal lines",
    ),
    Mutation(
        "no warning with a change of mode", "running/tracking.py",
        "            self._warn_of_skipped(self.num_batches_skipped)\n", "            pass\n",
        "compiled code never warns",
    ),
    Mutation(
        "compiled code reads whether it was warned", "running/tracking.py",
        "if torch.compiler.is_compiling() or self._warned_of_skipped:", "if self._warned_of_skipped or torch.compiler.is_compiling():",  # noqa: E501
        "compiled again after the warning",
    ),
]  # fmt: skip
