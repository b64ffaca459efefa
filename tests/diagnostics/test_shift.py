"""ShiftMeter: percentiles and drifts in closed form, gradient shifts by their definition, a training left alone."""

import copy
import json
import math
import pickle
import statistics
import sys
import time
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torchvision import models

import batchnorm as bn
from batchnorm.diagnostics.distribution import distribution
from batchnorm.diagnostics.shift import typical
from batchnorm.diagnostics.shift_figure import some_layers
from batchnorm.diagnostics.sites import is_nonlinearity, sites
from batchnorm.training.digits_trainer import _travel
from tests.diagnostics.networks import Own
from tests.mutations.mutation import Mutation

AT = (0.15, 0.50, 0.85)


def small():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def train(model, optimizer, data, loss=lambda made: made.square().mean()):
    for x in data:
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()


def squares(model, x):
    return model(x).square().mean()


def hooks(model, optimizer=None):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return own + (0 if optimizer is None else len(optimizer._optimizer_step_post_hooks))


class Given(nn.Module):
    """A network whose layer gets what the test gives."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.layer(x * self.scale)


def looks(values, layer=None, **options):
    """What a meter says of these inputs, one a step."""
    model = Given(layer or nn.ReLU())
    with bn.ShiftMeter(model, every=1, layers="layer", **options) as meter:
        for x in values:
            model(x)
    return meter


@pytest.mark.parametrize("shape", [(60, 100), (8, 5, 7), (4, 3, 6, 5), (2, 3, 2, 4, 5), (1, 1)])
def test_percentiles_are_exact(shape):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    (row,) = looks([x], unit=0).history
    by_channel = x.movedim(1, 0).flatten(1).numpy()
    assert np.allclose(row.percentiles, np.quantile(by_channel[0], AT), rtol=1e-12)
    assert np.allclose(row.layer_percentiles, np.quantile(by_channel, AT), rtol=1e-12)
    found = looks([x], unit=0).latest["layer"]
    assert np.allclose(found.percentiles, np.quantile(by_channel, AT, axis=1), rtol=1e-12)
    assert np.allclose(found.mean, by_channel.mean(1)) and np.allclose(found.variance, by_channel.var(1))


@pytest.mark.parametrize("channels", [1, 3, 64, 300])
def test_they_are_exact_as_far_as_is_said_and_near_beyond(channels):
    most = max(256, 65_536 // channels)
    x = torch.rand(most, channels, dtype=torch.float64)
    assert distribution(x, 1).percentiles.equal(torch.quantile(x, x.new_tensor(AT), dim=0))
    width = round(most**0.5)
    # each column of the images is another value: a stride of their width would see a single one
    image = torch.linspace(0, 1, width, dtype=torch.float64).expand(5, channels, 2 * width, width)
    found = distribution(image, 1)
    assert torch.allclose(found.percentiles, image.new_tensor(AT)[:, None], atol=1.5 / width)
    assert torch.allclose(found.of_all, image.new_tensor(AT), atol=1.5 / width)
    # each image another value: the first ones alone would be seen without a stride
    image = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None, None, None].expand(101, channels, 20, 20)
    assert torch.allclose(distribution(image, 1).percentiles, image.new_tensor(AT)[:, None], atol=0.02)


def test_large_ones_are_sampled_the_same_way_each_time_and_without_random_numbers():
    x = torch.randn(16, 8, 100, 100)
    state = torch.get_rng_state()
    first, second = distribution(x, 1), distribution(x.clone(), 1)
    assert torch.equal(first.percentiles, second.percentiles)
    assert torch.equal(torch.get_rng_state(), state)
    exact = torch.quantile(x.movedim(1, 0).flatten(1), torch.tensor(AT), dim=1)
    assert (
        0 < (first.percentiles - exact).abs().max() < 5 * 1.53 / 8192**0.5
    )  # five standard errors at the 15th


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_moments_do_not_lose_a_large_mean(kind):
    x = (torch.randn(64, 4, 9, dtype=torch.float64) + 200).to(kind)
    found = distribution(x, 1)
    assert found.variance.dtype == torch.float32
    variance, mean = torch.var_mean(x.double(), (0, 2), correction=0)
    assert torch.allclose(found.mean.double(), mean, rtol=1e-6)
    assert torch.allclose(found.variance.double(), variance, rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_in_memory_is_nothing(layout):
    x = torch.randn(8, 6, 40, 40)
    plain, other = distribution(x, 1), distribution(x.contiguous(memory_format=layout), 1)
    for name, value in vars(plain).items():
        assert torch.allclose(getattr(other, name), value, rtol=1e-4, atol=1e-6), name


def test_drifts_are_those_of_the_closed_form():
    x = torch.randn(32, 3, 5, dtype=torch.float64)
    x = (x - x.mean((0, 2), keepdim=True)) / x.std((0, 2), correction=0, keepdim=True)
    mean = torch.tensor([[0.0, 1.0, 2.0], [0.5, 1.0, 5.0]])[..., None].double()
    std = torch.tensor([[1.0, 2.0, 4.0], [3.0, 2.0, 2.0]])[..., None].double()
    first, second = looks([x * std[0] + mean[0], x * std[1] + mean[1]]).history
    assert (first.mean_drift, first.std_drift, first.steps, first.moved, first.travel) == (
        None,
        None,
        0,
        0,
        0,
    )
    assert second.steps == 1
    assert second.mean_drift == pytest.approx(math.sqrt((0.5**2 + 0 + (3 / 4) ** 2) / 3))
    assert second.std_drift == pytest.approx(math.sqrt((math.log(3) ** 2 + 0 + math.log(2) ** 2) / 3))
    # in the units of the layer's own spread: a scale and a shift of both change nothing
    scaled = looks([7 * (x * std[0] + mean[0]) - 4, 7 * (x * std[1] + mean[1]) - 4]).history[1]
    assert scaled.mean_drift == pytest.approx(second.mean_drift)
    assert scaled.std_drift == pytest.approx(second.std_drift)


def test_moved_and_travel_are_those_of_the_medians_in_widths():
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]  # median 0, width 1.4
    rows = looks([x, x + 1.4, x - 0.7, x + 0.7]).history
    assert [each.moved for each in rows] == pytest.approx([0, 1, 0.5, 0.5])
    assert [each.travel for each in rows] == pytest.approx([0, 1, 2.5, 3.5])
    varied = [torch.randn(50, 6, dtype=torch.float64) * (1 + step) + step for step in range(5)]
    watched = [torch.quantile(each, torch.tensor(AT).double(), dim=0) for each in varied]
    assert looks(varied).history[-1].travel == pytest.approx(_travel(watched))  # as the experiment has it


@pytest.mark.parametrize("shape", [(100, 50), (16, 50, 12)])
def test_noise_is_the_drift_of_what_stands_still(shape):
    rows = looks([torch.randn(shape, dtype=torch.float64) for _ in range(60)]).history[1:]
    for drift, noise in (("mean_drift", "mean_noise"), ("std_drift", "std_noise")):
        drifts, noises = ([getattr(each, name) ** 2 for each in rows] for name in (drift, noise))
        assert statistics.fmean(drifts) == pytest.approx(statistics.fmean(noises), rel=0.15)


def test_examples_and_not_their_pixels_are_what_is_independent():
    images = [torch.randn(16, 50, 1, dtype=torch.float64).expand(16, 50, 12) for _ in range(40)]
    rows = looks(images).history[1:]
    ratio = statistics.fmean(each.mean_drift**2 for each in rows) / statistics.fmean(
        each.mean_noise**2 for each in rows
    )
    assert 0.85 < ratio < 1.15


def test_a_single_example_has_drifts_but_no_noise():
    first, second = looks([torch.randn(1, 4, 9), torch.randn(1, 4, 9)]).history
    assert second.mean_drift > 0 and second.mean_noise is None and first.mean_noise is None


def test_channels_that_do_not_vary_are_left_out():
    x = torch.randn(20, 3, dtype=torch.float64)
    x[:, 1] = 5
    (_, second) = looks([x, x + x.std(0, correction=0)]).history
    assert second.mean_drift == pytest.approx(1)
    constant = looks([torch.ones(20, 3), torch.ones(20, 3)]).history[1]
    assert (constant.mean_drift, constant.moved, constant.unit) == (None, None, 0)


def test_inf_and_nan_are_shown_and_not_kept():
    x = torch.randn(20, 3, dtype=torch.float64)
    bad = x.clone()
    bad[3] = math.nan
    rows = looks([x, bad, x + 1]).history
    assert [each.steps for each in rows] == [0, 1, 2]
    assert math.isnan(rows[1].percentiles[1]) and rows[1].mean_drift is None and rows[1].travel is None
    assert rows[2].mean_drift == pytest.approx(float((1 / x.var(0, correction=0)).mean().sqrt()))
    assert math.isnan(looks([bad, x]).history[0].percentiles[0]) and len(looks([bad, x]).history) == 2


def test_the_typical_unit_is_in_the_middle():
    x = torch.randn(1000, 5, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    x = x * torch.tensor([1.0, 9.0, 1.1, 0.1, 1.0]) + torch.tensor([0.0, 0.0, 0.1, 0.0, 7.0])
    assert typical(distribution(x, 1)) == 0
    meter = looks([x, x.flip(1)])  # the first look chooses
    assert [each.unit for each in meter.history] == [0, 0]
    assert looks([x], unit=3).history[0].unit == 3
    with pytest.raises(ValueError, match="'layer' has 5 channels, no unit 5"):
        looks([x], unit=5)


def test_another_number_of_channels_is_a_new_beginning():
    rows = looks([torch.randn(9, 7), torch.randn(9, 2), torch.randn(9, 2)]).history
    assert [each.mean_drift is None for each in rows] == [True, True, False]
    assert rows[1].unit < 2


# Which layers, which steps


def test_layers_are_normalizations_then_nonlinearities_then_what_is_named():
    def paths(model, patterns=None):
        return [each.path for each in sites(model, patterns, None)]

    model = small()
    assert paths(model) == ["1"]
    assert paths(model, "2") == ["2"]
    assert paths(model, ["3", "1"]) == ["1", "3"]
    assert paths(model, "*") == ["1"]
    plain = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.Softmax(1))
    assert paths(plain) == ["1"]
    with pytest.raises(ValueError, match="no module has a path like 'fc'"):
        bn.ShiftMeter(model, layers=["1", "fc"])
    with pytest.raises(ValueError, match="name the layers"):
        bn.ShiftMeter(nn.Linear(3, 3))
    assert not is_nonlinearity(nn.MultiheadAttention(4, 1))
    assert is_nonlinearity(timm.layers.activations.Swish())


def test_channels_are_where_the_layer_before_has_them():
    def dims(model):
        return {each.path: each.dim for each in sites(model, "*", None)}

    assert dims(nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU())) == {"1": 1}
    assert dims(nn.Sequential(nn.Linear(3, 4), nn.ReLU())) == {"1": -1}
    assert dims(nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(1, 4), nn.ReLU())) == {"2": 1}
    assert dims(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())) == {"1": 1}
    assert dims(nn.Sequential(timm.layers.norm.LayerNorm2d(4), nn.ReLU())) == {"1": 1}
    assert dims(nn.Sequential(bn.BatchNorm((4, 3)))) == {"0": None}
    x = torch.randn(8, 5, 3, dtype=torch.float64)
    assert looks([x], channels=-1).latest["layer"].mean.shape == (3,)
    found = looks([x], bn.BatchNorm((5, 3), dtype=torch.float64)).latest["layer"]
    assert torch.allclose(found.mean, x.mean(0).flatten())


@pytest.mark.parametrize("counted_by", ["optimizer", "forward passes"])
def test_every_step_that_is_due_is_looked_at(counted_by):
    model = small()
    optimizer = sgd(model)
    data = [torch.randn(16, 4) for _ in range(8)]
    with bn.ShiftMeter(model, optimizer if counted_by == "optimizer" else None, every=3) as meter:
        train(model, optimizer, data[:4])
        model.eval()
        model(data[0])
        model.train()
        with torch.no_grad():
            model(data[0])
        train(model, optimizer, data[4:])
    assert meter.step == 8
    assert [(each.step, each.steps) for each in meter.history] == [(0, 0), (3, 3), (6, 3)]
    train(model, optimizer, data)
    assert meter.step == 8


@pytest.mark.parametrize("counted_by", ["optimizer", "forward passes"])
def test_what_is_seen_is_what_came(counted_by):
    model = small()
    optimizer = sgd(model)
    data = [torch.randn(16, 4) + step for step in range(4)]
    expected, came = [], []
    model[1].register_forward_pre_hook(lambda _, given: came.append(given[0].detach().clone()))
    with bn.ShiftMeter(model, optimizer if counted_by == "optimizer" else None, every=1, unit=2) as meter:
        for x in data:
            model.eval()
            model(x + 9)  # between the steps: an evaluation, with gradients too
            with torch.no_grad():
                model.train()(x + 9)
            came.clear()
            train(model, optimizer, [x])
            expected.append(torch.quantile(came[0][:, 2], torch.tensor(AT)).tolist())
    assert [list(each.percentiles) for each in meter.history] == [pytest.approx(each) for each in expected]


def test_the_first_micro_batch_and_the_first_call_are_looked_at():
    layer = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4), layer)
    optimizer = sgd(model)
    with bn.ShiftMeter(model, optimizer, every=1) as meter:
        first = torch.randn(16, 4)
        model(first).sum().backward()
        model(torch.randn(16, 4) + 5).sum().backward()
        expected = model[0](first).mean(0).double()
        optimizer.step()
    assert torch.allclose(meter.latest["1"].mean, expected) and len(meter.history) == 1


def test_modules_that_are_called_without_their_model_are_seen():
    model = small()
    optimizer = sgd(model)
    with bn.ShiftMeter(model, optimizer, every=1) as meter:
        model[1](model[0](torch.randn(8, 4))).sum().backward()
        optimizer.step()
    assert [each.layer for each in meter.history] == ["1"]


def test_a_model_that_is_itself_the_layer():
    layer = nn.BatchNorm1d(4)
    with bn.ShiftMeter(layer, every=2) as meter:
        for _ in range(3):
            layer(torch.randn(8, 4))
    assert [(each.layer, each.step) for each in meter.history] == [("", 0), ("", 2)]
    assert "(the model)" in str(meter)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("counted_by", ["optimizer", "forward passes"])
def test_recomputation_is_not_a_step(reentrant, counted_by):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest = nn.Linear(4, 4), small()

        def forward(self, x):
            return checkpoint(self.rest, self.first(x), use_reentrant=reentrant)

    model = Checkpointed()
    optimizer = sgd(model)
    came = []
    with bn.ShiftMeter(model, optimizer if counted_by == "optimizer" else None, every=1) as meter:
        for step in range(3):
            x = torch.randn(16, 4)
            came.append(model.rest[0](model.first(x)).mean(0).detach().double())
            train(model, optimizer, [x])
            assert torch.allclose(meter.latest["rest.1"].mean, came[-1], atol=1e-6)
            assert meter.step == step + 1
    assert len(meter.history) == 3
    shifts = bn.ShiftMeter(model, optimizer).gradient_shift(lambda: model(x).square().mean())
    assert [each.layer for each in shifts] == ["first", "rest.0", "rest.3"] and shifts[1].shift > 0


def test_recomputing_the_whole_model_is_not_a_step():
    model = small()
    optimizer = sgd(model)
    with bn.ShiftMeter(model, every=1) as meter:
        for _ in range(2):
            checkpoint(model, torch.randn(16, 4), use_reentrant=False).sum().backward()
            optimizer.step()
    assert meter.step == 2 and len(meter.history) == 2


def test_under_autocast():
    model = small()
    optimizer = sgd(model)
    with bn.ShiftMeter(model, optimizer, every=1) as meter:
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(torch.randn(64, 4)).float().square().mean()
            loss.backward()
            optimizer.step()
    assert all(math.isfinite(each.percentiles[1]) for each in meter.history)
    x = torch.randn(64, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # whose cache holds the weights of before
        shifts = meter.gradient_shift(lambda: model(x).float().square().mean())
    assert shifts[1].shift > 0


def test_in_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alone = small()
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
        data = [torch.randn(16, 4) for _ in range(3)]
        meters = []
        for each in (alone, model):
            optimizer = sgd(each)
            with bn.ShiftMeter(each, optimizer, every=1) as meter:
                train(each, optimizer, data)
                meter.gradient_shift(partial(squares, each, data[0]))
            train(each, optimizer, data[:1])  # its reducer is not confused
            meters.append(meter)
        assert meters[0].as_dict() == meters[1].as_dict()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's, of its own reading
@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_compiled_models_run_uncompiled_for_the_steps_that_are_looked_at(how):
    graphs, runs = [], []

    def backend(graph, _):
        graphs.append(graph)

        def run(*given):
            runs.append(meter.step)
            return graph(*given)

        return run

    torch.compiler.reset()
    model = small()
    plain = copy.deepcopy(model)
    if how == "wrapped":
        model = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    else:
        model[1].compile(backend=backend)
    data = [torch.randn(16, 4) for _ in range(7)]
    found = []
    for each in (model, plain):
        optimizer = sgd(each)
        with bn.ShiftMeter(each, optimizer, every=3) as meter:
            train(each, optimizer, data)
        found.append(meter)
    assert sorted(set(runs)) == [1, 2, 4, 5]
    assert len(graphs) == 1
    assert [each.percentiles for each in found[0].history] == [
        pytest.approx(each.percentiles, rel=1e-4) for each in found[1].history
    ]
    with pytest.raises(ValueError, match="compiled model"):
        bn.ShiftMeter(model)
    shifts = found[0].gradient_shift(lambda: model(data[0]).square().mean())
    assert shifts[1].shift > 0


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["the step", "the model too"])
def test_a_step_of_the_optimizer_that_is_compiled(whole):
    torch.compiler.reset()
    model = small()
    optimizer = sgd(model)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    called = model
    if whole:
        called = torch.compile(model, backend="eager")
    with bn.ShiftMeter(called, optimizer, every=2) as meter:
        for _ in range(5):
            optimizer.zero_grad()
            squares(called, torch.randn(16, 4)).backward()
            step()
    assert meter.step == 5 and [each.step for each in meter.history] == [0, 2, 4]


NETWORKS = {
    "resnet18": lambda: models.resnet18(num_classes=4),
    "mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050", num_classes=4),
    "vit_tiny": lambda: timm.create_model(
        "vit_tiny_patch16_224", num_classes=4, depth=2, img_size=64, patch_size=16
    ),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=4),
    "upgraded": lambda: bn.upgrade(models.resnet18(num_classes=4))[0],
    "own": Own,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    model = NETWORKS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data, labels = [torch.randn(4, 3, 64, 64) for _ in range(3)], torch.tensor([0, 1, 2, 3])
    with bn.ShiftMeter(model, optimizer, every=2) as meter:
        train(model, optimizer, data, lambda made: cross_entropy(made, labels))
    layers = {each.layer for each in meter.history}
    assert len(meter.history) == 2 * len(layers) == 2 * len(sites(model, None, None))
    assert all(0 < (each.mean_drift or 0) < math.inf for each in meter.history if each.steps)
    if name == "vit_tiny":
        assert meter.latest["blocks.0.mlp.act"].mean.shape == (4 * 192,)
    last = meter.gradient_shift(lambda: cross_entropy(model(data[0]), labels), [*list(weights(model))[-1:]])
    assert last[0].shift > 0 and -1 <= last[0].cosine <= 1


def weights(model):
    return {path: each for path, each in model.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)}


# The gradient shift


def test_the_gradient_shift_of_two_linear_layers_by_hand():
    """L = ½ (w₂ w₁ x - t)²: dL/dw₁ = (w₂ w₁ x - t) w₂ x, dL/dw₂ = (w₂ w₁ x - t) w₁ x."""
    w1, w2, x, t, rate = 0.7, -1.3, 2.0, 0.4, 0.05
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    for weight, value in zip(model.parameters(), (w1, w2), strict=True):
        nn.init.constant_(weight, value)
    given = torch.tensor([[x]], dtype=torch.float64)
    meter = bn.ShiftMeter(model, sgd(model, rate), layers="*")
    first, second = meter.gradient_shift(lambda: (model(given) - t).square().sum() / 2)
    g1, g2 = (w2 * w1 * x - t) * w2 * x, (w2 * w1 * x - t) * w1 * x
    moved = w1 - rate * g1
    g2_after = (w2 * moved * x - t) * moved * x
    assert (first.layer, first.shift, first.cosine) == ("0", 0, 1)
    assert first.norm == pytest.approx(abs(g1), rel=1e-14)
    assert (second.layer, second.cosine) == ("1", math.copysign(1, g2 * g2_after))
    assert second.norm == pytest.approx(abs(g2), rel=1e-14)
    assert second.shift == pytest.approx(abs(g2 - g2_after), rel=1e-13)
    assert meter.gradients == [first, second]


class Branches(nn.Module):
    """Called in another order than registered, with dropout, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.side = nn.Linear(5, 6)
        self.stem = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = torch.tanh(self.stem(x)) * self.scale
        return self.head(self.drop(torch.relu(self.norm(self.side(x)))))


ORDER = ["", "stem", "side", "norm", "head"]
OPTIMIZERS = {
    "sgd": lambda each: torch.optim.SGD(each, lr=0.3, momentum=0.9, weight_decay=0.1),
    "adam": lambda each: torch.optim.Adam(each, lr=0.05),
    "adamw, fused": lambda each: torch.optim.AdamW(each, lr=0.05, fused=True),
    "rmsprop": lambda each: torch.optim.RMSprop(each, lr=0.05, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_gradient_shift_is_santurkar_s(name):
    """Definition 2.1, layer by layer, on models that are built anew: those before i as updated, the others not."""
    torch.manual_seed(3)
    model = Branches().double()
    optimizer = OPTIMIZERS[name](model.parameters())
    data = [torch.randn(16, 4, dtype=torch.float64) for _ in range(3)]
    labels = torch.randint(3, (16,))
    train(model, optimizer, data, lambda made: cross_entropy(made, labels))  # so that it has moments
    x = torch.randn(16, 4, dtype=torch.float64)
    random = torch.get_rng_state()

    def gradient(state):
        other = Branches().double()
        other.load_state_dict(state)
        torch.set_rng_state(random)
        cross_entropy(other(x), labels).backward()
        return {name: each.grad for name, each in other.named_parameters()}

    old = copy.deepcopy(model.state_dict())
    before = gradient(old)
    stepped = Branches().double()
    stepped.load_state_dict(old)
    other = OPTIMIZERS[name](stepped.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, parameter in stepped.named_parameters():
        parameter.grad = before[key].clone()
    other.step()
    new = {key: parameter.detach() for key, parameter in stepped.named_parameters()}

    def layer_of(key):
        return key.rpartition(".")[0]

    torch.set_rng_state(random)
    meter = bn.ShiftMeter(model, optimizer)
    found = meter.gradient_shift(lambda: cross_entropy(model(x), labels), ["*"])
    assert [each.layer for each in found] == ORDER
    for number, each in enumerate(found):
        mixed = {
            key: new[key] if key in new and layer_of(key) in ORDER[:number] else value
            for key, value in old.items()
        }
        after = gradient(mixed)
        keys = [key for key in before if layer_of(key) == each.layer]
        g, g_after = (torch.cat([side[key].flatten() for key in keys]) for side in (before, after))
        assert each.norm == pytest.approx(float(g.norm()), rel=1e-9)
        assert each.shift == pytest.approx(float((g - g_after).norm()), rel=1e-6, abs=1e-12)
        cosine = torch.nn.functional.cosine_similarity(g, g_after, dim=0)
        assert each.cosine == pytest.approx(float(cosine), rel=1e-9)
    only = meter.gradient_shift(lambda: cross_entropy(model(x), labels), "side")
    assert len(only) == 1 and only[0].layer == "side"
    usual = meter.gradient_shift(lambda: cross_entropy(model(x), labels))
    assert [each.layer for each in usual] == ["stem", "side", "head"]


def everything(model, optimizer):
    """All that a training knows, as values."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "gradients": [None if each.grad is None else each.grad.clone() for each in model.parameters()],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "random": torch.get_rng_state(),
        "numpy": str(np.random.get_state()),
        "modes": [each.training for each in model.modules()],
        "hooks": hooks(model, optimizer),
    }


def same(one, other):
    if isinstance(one, torch.Tensor | np.ndarray):
        return bool((torch.as_tensor(one) == torch.as_tensor(other)).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("fails", [False, True])
def test_the_gradient_shift_leaves_everything_as_it_was(fails):
    model, critic = Branches(), nn.Linear(3, 1)
    model.drop.eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    stepped = []
    optimizer.register_step_post_hook(lambda *_: stepped.append(1))
    train(model, optimizer, [torch.randn(16, 4)])
    x = torch.randn(16, 4)
    calls = []

    def loss():
        calls.append(1)
        if fails and len(calls) == 3:
            raise RuntimeError("no third time")
        np.random.rand()
        return critic(model(x) + 0.1 * torch.randn(3)).mean()

    critic(model(x)).mean().backward()
    waiting = model(x).sum()  # a graph of the caller's, whose backward pass is still to come
    before, of_critic = everything(model, optimizer), copy.deepcopy(critic.weight.grad)
    with bn.ShiftMeter(model, optimizer, every=1) as meter:
        hooked = hooks(model, optimizer)
        if fails:
            with pytest.raises(RuntimeError, match="no third time"):
                meter.gradient_shift(loss)
        else:
            meter.gradient_shift(loss)
        assert hooks(model, optimizer) == hooked
        assert meter.step == 0
    assert same(everything(model, optimizer), before)
    assert same(critic.weight.grad, of_critic)
    assert len(stepped) == 1 and schedule.last_epoch == 0
    assert meter.history == [] and len(meter.gradients) == (0 if fails else 3)
    waiting.backward()


def test_a_parameter_of_two_layers_is_that_of_the_first_and_one_that_no_layer_calls_that_of_the_one_around():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, 10, bias=False)
            self.embed = nn.Embedding(10, 8)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out.weight = self.embed.weight

        def forward(self, x):
            x = self.embed(x)
            return self.out(self.attend(x, x, x)[0])

    model = Tied()
    meter = bn.ShiftMeter(model, sgd(model), layers="out")
    x = torch.randint(10, (4, 5))
    found = meter.gradient_shift(lambda: model(x).square().mean())
    assert [each.layer for each in found] == ["embed", "attend"]
    assert found[1].norm > 0 and found[1].shift > 0


def test_frozen_and_unused_parameters_have_no_gradient_to_shift():
    model = small()
    model.unused = nn.Linear(3, 3)
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    meter = bn.ShiftMeter(model, optimizer)
    x = torch.randn(8, 4)
    found = meter.gradient_shift(lambda: model[:4](x).square().mean(), ["*"])
    assert [each.layer for each in found] == ["1", "3"]
    assert found[0].shift == 0


def test_what_gradient_shift_refuses():
    model = small()
    x = torch.randn(8, 4)

    def loss():
        return model(x).square().mean()

    with pytest.raises(ValueError, match="ShiftMeter\\(model, optimizer\\)"):
        bn.ShiftMeter(model).gradient_shift(loss)
    meter = bn.ShiftMeter(model, sgd(model))
    with pytest.raises(ValueError, match=r"'5'.*there are 0, 1, 3"):
        meter.gradient_shift(loss, ["0", "5"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="closure"):
        bn.ShiftMeter(model, torch.optim.LBFGS(model.parameters())).gradient_shift(loss)
    assert same(model.state_dict(), before)
    model[0].weight.register_post_accumulate_grad_hook(lambda each: None)
    with pytest.raises(ValueError, match="act in a backward pass"):
        meter.gradient_shift(loss)


def test_an_optimizer_in_a_wrapper():
    class Wrapper(torch.optim.Optimizer):
        """As accelerate's, which has no hooks of its own."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            self.optimizer.step(closure)

        def zero_grad(self, set_to_none=True):
            self.optimizer.zero_grad(set_to_none)

    model = small()
    optimizer = Wrapper(sgd(model))
    with bn.ShiftMeter(model, optimizer, every=1) as meter:
        train(model, optimizer, [torch.randn(8, 4)] * 2)
    assert meter.step == 2
    before = copy.deepcopy(model.state_dict())
    assert meter.gradient_shift(lambda: model(torch.ones(8, 4)).square().mean())
    assert same(model.state_dict(), before)


# Nothing of the training is changed


def test_a_training_comes_out_the_same():
    results = []
    for metered in (False, True):
        torch.manual_seed(1)
        model = Branches()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        meter = bn.ShiftMeter(model, optimizer, every=2)
        if metered:
            meter.start()
        for _ in range(7):
            train(model, optimizer, [torch.randn(16, 4)])
        meter.stop()
        results.append(everything(model, optimizer))
    assert same(*results)
    assert results[1]["hooks"] == 0 and len(meter.history) == 4


def test_hooks_are_gone_after_an_error_and_between_looks():
    model = small()
    optimizer = sgd(model)
    with bn.ShiftMeter(model, optimizer) as meter:
        meter.start()  # once is enough
        assert hooks(model, optimizer) == 4
        train(model, optimizer, [torch.randn(8, 4)])
        assert hooks(model, optimizer) == 1
    assert hooks(model, optimizer) == 0
    meter.step = 0
    with pytest.raises(ZeroDivisionError), meter:
        1 / hooks(nn.Linear(1, 1))
    assert hooks(model, optimizer) == 0
    with pytest.raises(RuntimeError), bn.ShiftMeter(model) as meter:
        model(torch.randn(8, 5))  # a shape that fails inside
    assert hooks(model) == 0 and meter.step == 0 and meter.history == []
    meter.stop()


def test_an_error_in_a_pass_does_not_make_the_next_evaluation_a_step():
    model = small()
    with bn.ShiftMeter(model, sgd(model), every=1) as meter:
        with pytest.raises(RuntimeError):
            model(torch.randn(8, 5))
        with torch.no_grad():
            model[1](torch.randn(8, 6))
        meter._end_step()
    assert meter.history == []


def test_copies_and_pickles_of_the_model_have_no_part_in_it():
    model = small()
    optimizer = sgd(model)
    with bn.ShiftMeter(model, optimizer, every=1) as meter, bn.ShiftMeter(model, every=1) as other:
        for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            each(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    assert (meter.step, other.step) == (1, 0)
    assert meter.history == other.history == []


def test_it_goes_on_after_a_pause():
    model = small()
    optimizer = sgd(model)
    meter = bn.ShiftMeter(model, optimizer, every=2)
    meter.step = 100  # of a training that is resumed
    for _ in range(3):
        with meter:
            train(model, optimizer, [torch.randn(8, 4)])
        train(model, optimizer, [torch.randn(8, 4)])
    assert [each.step for each in meter.history] == [100, 102]
    with pytest.raises(ValueError, match="every"):
        bn.ShiftMeter(model, every=0)


def test_inputs_that_are_named_nested_or_none():
    class Takes(nn.Module):
        def forward(self, *given, **named):
            return given, named

    model = nn.Sequential(Takes())
    x = torch.randn(8, 4)
    for given, named in (
        ((), {"x": x}),
        (((torch.arange(3), x),), {}),
        ((torch.arange(3), None), {"x": [x]}),
    ):
        with bn.ShiftMeter(model, every=1, layers="0") as meter:
            model[0](*given, **named)
            meter._end_step()
        assert torch.allclose(meter.latest["0"].mean, x.mean(0).double())
    with bn.ShiftMeter(model, every=1, layers="0") as meter:
        for nothing in (torch.arange(3), torch.randn(3), torch.randn(0, 3), None):
            model[0](nothing)
        meter._end_step()
    assert meter.history == []


# What is made of it


@pytest.fixture
def metered():
    model = small()
    optimizer = sgd(model)
    with bn.ShiftMeter(model, optimizer, ["1", "2"], every=2) as meter:
        train(model, optimizer, [torch.randn(16, 4) for _ in range(5)])
        x = torch.randn(16, 4)
        meter.gradient_shift(lambda: model(x).square().mean())
    return meter


def test_scalars_are_written_once(metered, tmp_path):
    class Writer:
        def __init__(self):
            self.values = {}

        def add_scalar(self, tag, value, step):
            assert (tag, step) not in self.values
            self.values[tag, step] = value

    writer = Writer()
    metered.write(writer)
    metered.write(writer)
    row = metered.history[-1]
    assert (row.layer, row.step) == ("2", 4)
    assert writer.values["input of 2/unit 50th percentile", 4] == row.percentiles[1]
    assert writer.values["input of 2/layer 85th percentile", 4] == row.layer_percentiles[2]
    assert writer.values["input drift of mean/2", 4] == row.mean_drift
    assert writer.values["input drift of std/2", 4] == row.std_drift
    assert ("input drift of mean/2", 0) not in writer.values
    assert writer.values["gradient shift/3", 5] == metered.gradients[1].shift
    assert writer.values["gradient cosine/3", 5] == metered.gradients[1].cosine
    before = len(writer.values)
    with metered:
        pass
    metered.history.append(row)
    other = Writer()
    metered.write(other)
    assert len(other.values) == 9 and len(writer.values) == before


@pytest.mark.slow
def test_tensorboard_reads_what_is_written(metered, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        metered.write(writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = {each.step: each.value for each in events.Scalars("input of 1/unit 50th percentile")}
    assert scalars == pytest.approx(
        {each.step: each.percentiles[1] for each in metered.history if each.layer == "1"}
    )


def test_lines_are_all_of_it_and_replace_a_file_as_a_whole(metered, tmp_path, monkeypatch):
    path = tmp_path / "new" / "shift.jsonl"
    metered.save(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [each.pop("kind") for each in rows] == ["shift"] * 6 + ["gradient"] * 2
    found = metered.as_dict()
    assert rows == found["shifts"] + found["gradients"]
    assert rows[0]["percentiles"] == list(metered.history[0].percentiles) and rows[0]["mean_drift"] is None
    before = path.read_text()
    monkeypatch.setattr(json, "dumps", lambda row: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        metered.save(str(path))
    assert path.read_text() == before and [each.name for each in path.parent.iterdir()] == ["shift.jsonl"]


def test_what_is_not_finite_is_a_word():
    bad = torch.full((8, 4), math.nan)
    found = looks([bad]).as_dict()["shifts"][0]
    assert found["percentiles"] == ["nan"] * 3
    json.dumps(found, allow_nan=False)


def test_it_prints_as_a_table(metered):
    head, first, second, last = str(metered).splitlines()
    assert head.split()[0] == "layer" and [first.split()[0], second.split()[0]] == ["1", "2"]
    assert last.startswith("3 looks in 5 steps")
    rows = [each for each in metered.history if each.layer == "1"]
    assert first.split()[1:4] == [
        f"{rows[-1].moved:.2f}",
        f"{rows[-1].travel:.2f}",
        f"{sum(each.mean_drift for each in rows[1:]) / 4:.2g}",
    ]
    empty = bn.ShiftMeter(small())
    assert "0 looks in 0 steps" in repr(empty)


def test_figures(metered, tmp_path):
    metered.figure(tmp_path / "shift.svg")
    drawn = (tmp_path / "shift.svg").read_text()
    assert drawn.count("median, and 15th to 85th percentile") == 2 and "training steps" in drawn
    metered.figure(str(tmp_path / "one.svg"), layers="2")
    assert (tmp_path / "one.svg").read_text().count("median, and") == 1
    metered.figure(tmp_path / "shift.png")
    assert (tmp_path / "shift.png").read_bytes()[1:4] == b"PNG"
    looks([torch.full((8, 4), math.nan)] * 2).figure(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        metered.figure("shift.pdf")
    with pytest.raises(ValueError, match="'7': there are 1, 2"):
        metered.figure("shift.png", layers="7")
    with pytest.raises(ValueError, match="nothing was looked at"):
        bn.ShiftMeter(small()).figure("shift.png")
    names = [str(number) for number in range(20)]
    assert some_layers(names) == ["0", "6", "13", "19"] and some_layers(names[:3]) == names[:3]
    many = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(13)))
    with bn.ShiftMeter(many, every=1) as meter:
        many(torch.randn(8, 3))
    with pytest.raises(ValueError, match="12 layers at most, these are 13"):
        meter.figure("shift.png", layers="*")


def test_a_figure_without_its_packages_says_what_to_install(metered, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("batchnorm.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="matplotlib, which is not installed: pip install"):
        metered.figure(tmp_path / "shift.png")


# What it costs


def share(make, size, every, rounds=6):
    """The share of a training step that the meter takes at its rate, and that of a look: medians of steps in turn."""
    torch.manual_seed(0)
    model = make()
    optimizer = sgd(model, 0.01, momentum=0.9)
    x, labels = torch.randn(size), torch.randint(4, (size[0],))
    seconds: dict[str, list[float]] = {"plain": [], "with a look": []}
    meter = bn.ShiftMeter(model, optimizer, every=every)
    for _ in range(rounds):
        for kind, of_kind in seconds.items():
            meter.step = 0
            begun = time.perf_counter()
            if kind == "with a look":
                meter.start()
            train(model, optimizer, [x], lambda made: cross_entropy(made, labels))
            of_kind.append(time.perf_counter() - begun)
            meter.stop()
    meter.step = 1
    with meter:  # what is left of it between the looks
        begun = time.perf_counter()
        for _ in range(every - 2):
            meter._end_step()
        counting = (time.perf_counter() - begun) / (every - 2)
    plain = statistics.median(seconds["plain"][1:])
    look = statistics.median(seconds["with a look"][1:]) - plain
    return (look / every + counting) / plain, look / plain


@pytest.mark.slow
def test_it_costs_no_more_than_a_twentieth_of_a_step():
    """At the default rate; of a ResNet-18 on small images, where a look is large beside a step."""
    of_all, of_one = share(lambda: models.resnet18(num_classes=4), (32, 3, 64, 64), 50)
    print(f"{of_all:.2%} of a step at every=50; a look alone is {of_one:.0%} of one")
    assert of_all <= 0.05


MUTATIONS = [
    Mutation(
        "drift in the new spread", "diagnostics/shift.py",
        "(found.mean - before.mean).square() / before.variance", "(found.mean - before.mean).square() / found.variance",
        "a layer whose spread grows seems to stand still",
    ),
    Mutation(
        "layers before are not updated", "diagnostics/gradient_shift.py",
        "_write(parameters[each], updated[parameters[each]])", "pass",
        "no gradient ever shifts",
    ),
    Mutation(
        "layers in the order of registration", "diagnostics/gradient_shift.py",
        "order.get(modules[path], len(order))", "0",
        "what comes after a layer is updated before it",
    ),
    Mutation(
        "the optimizer's moments are forgotten", "diagnostics/gradient_shift.py",
        '("state", "param_groups")', '("param_groups",)',
        "the update is that of a first step",
    ),
    Mutation(
        "recomputation is looked at", "diagnostics/shift_meter.py",
        "self._model.training and not recomputed and", "self._model.training and",
        "checkpointing counts steps twice",
    ),
    Mutation(
        "pixels are independent", "diagnostics/distribution.py",
        "        _error(means),", "        spreads.mean(0) / (values.shape[0] * values.shape[2]),",
        "the noise of images is far too small",
    ),
    Mutation(
        "the first places alone", "diagnostics/distribution.py",
        "stride = round(_GOLDEN * number)", "stride = 1",
        "percentiles of a batch are those of its first images",
    ),
]  # fmt: skip
