"""Batch renormalization against its formula in plain torch, whose gradient autograd finds."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.statistics import Ramp
from tests.statistics.inputs import KERNELS, asking, assert_near, each_kernels, outcome, random

EPS = 1e-3


def columns(values, x):
    return values.reshape(-1, *[1] * (x.dim() - 2))


def corrections(x, running, limits, mask=None):
    """The batch's mean and σ, and r and d, which are constants."""
    (running_mean, running_var), (rmax, dmax) = running, limits
    values = x.movedim(1, -1)
    values = values.flatten(0, -2) if mask is None else values[mask[:, 0]]
    mean, sigma = values.mean(0), (values.var(0, correction=0) + EPS).sqrt()
    sigma_run = (running_var + EPS).sqrt()
    r = (sigma / sigma_run).clamp(1 / rmax, rmax).detach()
    d = ((mean - running_mean) / sigma_run).clamp(-dmax, dmax).detach()
    return mean, sigma, r, d


def oracle(x, weight, bias, residual, *, running, limits, mask=None):
    mean, sigma, r, d = (columns(t, x) for t in corrections(x, running, limits, mask))
    normal = (x - mean) / sigma * r + d
    y = torch.relu(normal * columns(weight, x) + columns(bias, x) + residual)
    return y if mask is None else torch.where(mask, y, 0)


LAYERS: dict[int, Any] = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}


def layer_of(shape, rmax=3.0, dmax=5.0, dtype=torch.float64, running=None, **options):
    layer = LAYERS[len(shape)](shape[1], EPS, dtype=dtype, statistics=bn.Renorm(rmax, dmax), **options)
    if running is not None:
        layer.running_mean.copy_(running[0])
        layer.running_var.copy_(running[1])
    return layer


def some_running(channels=3):
    return torch.randn(channels).double(), torch.rand(channels).double() + 0.5


def check(shape, kernels, limits, running, dtype=torch.float64, layout="contiguous", mask=None):
    x, residual, dy = (random(*shape, layout=layout, dtype=dtype) for _ in range(3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = [x, (torch.rand(shape[1]) + 0.5).to(wide), torch.randn(shape[1]).to(wide), residual]
    layer = layer_of(shape, limits[0], limits[1], wide, running, activation="relu")
    running = layer.running_mean.double(), layer.running_var.double()
    by_formula = partial(oracle, running=running, limits=limits, mask=mask)
    of_oracle = asking(*given, dtype=torch.float64)
    dy = torch.where(by_formula(*of_oracle) < 0.05, 0, dy)
    expected = outcome(by_formula, of_oracle, dy.double())

    def call(x, weight, bias, residual):
        return functional_call(layer, {"weight": weight, "bias": bias}, (x, residual, mask))

    with bn.kernels.use(kernels):
        found = outcome(call, [t.requires_grad_() for t in given], dy)
    assert_near(found, expected, dtype)


# Values are about 0.5 ± 1: of these running statistics some are beyond any of the limits, on either side.
FAR = torch.tensor([0.5, -40.0, 40.0, 0.5, 0.5]).double(), torch.tensor([1, 1, 1, 1e-3, 1e3]).double()


@each_kernels
@pytest.mark.parametrize("limits", [(1e6, 1e6), (3.0, 5.0), (1.5, 0.0), (1.0, 2.0)])
@pytest.mark.parametrize("shape", [(9, 5), (6, 5, 4), (4, 5, 3, 4), (3, 5, 2, 3, 2)])
def test_outputs_and_gradients_are_the_formula_s(shape, limits, kernels):
    check(shape, kernels, limits, FAR)


@each_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_narrow_types_and_any_layout(dtype, layout, kernels):
    check((6, 3, 4, 5), kernels, (1.2, 0.5), some_running(), dtype, layout)


@each_kernels
def test_with_a_mask(kernels):
    mask = torch.rand(6, 1, 7) < 0.6
    check((6, 5, 7), kernels, (3.0, 5.0), FAR, mask=mask)


@each_kernels
@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
def test_without_weight_or_bias(options, kernels):
    running, x = some_running(), random(7, 3).requires_grad_()
    layer = layer_of(x.shape, running=running, **options)
    weight = torch.ones(3).double() if layer.weight is None else nn.init.uniform_(layer.weight)
    expected = oracle(x, weight, torch.zeros(3).double(), 10, running=running, limits=(3.0, 5.0)) - 10
    with bn.kernels.use(kernels):
        y = layer(x)
        of = [x, *layer.parameters()]
        assert_close(y, expected)
        assert_close(*(torch.autograd.grad(t.sin().sum(), of) for t in (y, expected)))


@each_kernels
def test_gradients_of_weight_and_bias_contain_the_corrections(kernels):
    # Σ dy·x̂ with x̂ = (x - mean)/σ·r + d, and Σ dy
    running, x, dy = some_running(), random(7, 3), random(7, 3)
    mean, sigma, r, d = corrections(x, running, (1.2, 0.5))
    assert (r != 1).any() and (d != 0).any()
    layer = layer_of(x.shape, 1.2, 0.5, running=running)
    with bn.kernels.use(kernels):
        layer(x).backward(dy)
    assert_close(layer.weight.grad, (dy * ((x - mean) / sigma * r + d)).sum(0))
    assert_close(layer.bias.grad, dy.sum(0))


# --- what it is at its limits


@each_kernels
@pytest.mark.parametrize("shape", [(9, 3), (5, 3, 4, 6)])
def test_without_room_to_correct_it_is_batch_normalization(shape, kernels):
    layer, plain = layer_of(shape, 1, 0, torch.float32, some_running()), LAYERS[len(shape)](3, EPS)
    plain.load_state_dict(layer.state_dict())
    x, dy = random(*shape, dtype=torch.float32), torch.randn(shape)
    with bn.kernels.use(kernels):
        found = [outcome(lambda x, *_, m=m: m(x), [*asking(x), *m.parameters()], dy) for m in (layer, plain)]
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=2e-6, atol=2e-6)
    assert_close(layer.state_dict(), plain.state_dict())


@each_kernels
def test_within_the_limits_training_is_evaluation(kernels):
    layer = layer_of((8, 3, 4), 1e6, 1e6, running=some_running(), activation="relu")
    x, residual = random(8, 3, 4), random(8, 3, 4)
    with bn.kernels.use(kernels):
        expected = copy.deepcopy(layer).eval()(x, residual)
        assert_close(layer(x, residual), expected)
        assert (layer(x, residual) - expected).abs().max() > 1e-3  # the statistics have moved


@each_kernels
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_follow_the_batch_as_a_plain_layer_s(momentum, kernels):
    layer = layer_of((6, 3, 4), momentum=momentum)
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    with bn.kernels.use(kernels):
        for step in range(3):
            x = 2 * random(6, 3, 4) + 10 * step
            layer(x)
            values, share = x.movedim(1, -1).flatten(0, 1), momentum or 1 / (step + 1)
            mean, var = mean.lerp(values.mean(0), share), var.lerp(values.var(0), share)
    assert_close([layer.running_mean, layer.running_var], [mean, var], rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == 3


def test_a_mean_of_1e4_keeps_its_digits():
    x = (random(32, 4, 6, 5) + 1e4).float()
    running = x.double().mean((0, 2, 3)) + 0.1, torch.full((4,), 0.8).double()
    layer = layer_of(x.shape, dtype=torch.float32, running=running)
    expected = (x.double() - columns(layer.running_mean.double(), x)) / columns(
        (layer.running_var.double() + EPS).sqrt(), x
    )
    assert_close(layer(x).double(), expected, rtol=0, atol=1e-5)


# --- limits that depend on the step


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1), (100, 1), (101, 1.02), (150, 2.0), (199, 2.98), (200, 3), (10**12, 3)]
)
def test_a_ramp_in_closed_form(step, expected):
    found = Ramp(1, 3, 100, 200)(torch.tensor(step))
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)


def test_a_ramp_may_go_down():
    assert Ramp(5, 1, 0, 4)(torch.tensor(3)) == 2


def test_the_paper_s_schedule():
    # Ioffe (2017), section 4
    renorm: Any = bn.Renorm.scheduled()
    steps = torch.tensor([0, 5_000, 15_000, 22_500, 25_000, 40_000, 100_000])
    assert_close(renorm.rmax(steps), 1 + 2 * torch.tensor([0, 0, 2 / 7, 0.5, 4 / 7, 1, 1]).double())
    assert_close(renorm.dmax(steps), 5 * torch.tensor([0, 0, 0.5, 0.875, 1, 1, 1]).double())


@each_kernels
def test_the_step_is_the_number_of_batches_tracked(kernels):
    x, running = random(7, 3), some_running()
    layer = layer_of(x.shape, Ramp(1, 1.4, 1, 5), Ramp(0, 1.0, 2, 4), running=running)
    with bn.kernels.use(kernels):
        for limits in [(1, 0), (1, 0), (1.1, 0), (1.2, 0.5), (1.3, 1.0), (1.4, 1.0), (1.4, 1.0)]:
            before = layer.running_mean.clone(), layer.running_var.clone()
            expected = oracle(x, layer.weight, layer.bias, 10, running=before, limits=limits) - 10
            assert_close(layer(x), expected)


def test_limits_may_be_any_functions_of_the_step():
    x, running = random(7, 3), some_running()
    layer = layer_of(x.shape, lambda step: 1 + 0.1 * step, lambda _: 0.5, running=running)
    layer.num_batches_tracked.fill_(2)
    expected = oracle(x, layer.weight, layer.bias, 10, running=running, limits=(1.2, 0.5)) - 10
    assert_close(layer(x), expected)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), "state_dict"]
)
def test_the_step_goes_where_the_layer_goes(way):
    x, dtype = random(7, 3), torch.float64
    layer = bn.BatchNorm1d(3, dtype=dtype, statistics=bn.Renorm(Ramp(1, 3, 2, 8), Ramp(0, 5, 1, 3)))
    for _ in range(3):
        layer(random(7, 3) + 1)
    if way == "state_dict":
        other = bn.BatchNorm1d(3, dtype=dtype, statistics=layer.statistics)
        assert (other(x) - copy.deepcopy(layer)(x)).abs().max() > 1e-3
        other.load_state_dict(layer.state_dict())
    else:
        other = way(layer)
    assert other.statistics == layer.statistics
    assert torch.equal(other(x), layer(x))
    assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


# --- autograd's other ways, torch.func, compilers


@pytest.mark.parametrize("kernels", [k for k in KERNELS if k != "torch"])
def test_gradients_of_the_second_order(kernels):
    # r and d are constants of a gradient: far beyond the limits they are, and gradgradcheck's differences agree
    running = torch.tensor([30.0, -30.0]).double(), torch.tensor([0.01, 100.0]).double()
    layer = layer_of((4, 2, 2), 1.5, 0.5, running=running, activation="leaky_relu", momentum=0.0)

    def call(x, weight, bias, residual):
        return functional_call(layer, {"weight": weight, "bias": bias}, (x, residual))

    given = asking(random(4, 2, 2), torch.rand(2).double() + 0.5, random(2), random(4, 2, 2))
    with bn.kernels.use(kernels):
        assert gradgradcheck(call, given)


@pytest.mark.parametrize("kernels", [k for k in KERNELS if k != "torch"])
def test_a_gradient_that_keeps_its_graph_is_the_same_gradient(kernels):
    layer, x = layer_of((7, 3), 1.2, 0.5, running=some_running(), momentum=0.0), random(7, 3).requires_grad_()
    with bn.kernels.use(kernels):
        found = [
            torch.autograd.grad(layer(x).sin().sum(), [x, *layer.parameters()], create_graph=keep)
            for keep in (False, True)
        ]
    assert_close(*found)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own use of it
@pytest.mark.parametrize("with_grad", [True, False])
def test_forward_mode_agrees_with_the_backward_pass(with_grad):
    layer = layer_of((7, 3), 1.2, 0.5, running=some_running())
    x, tangent = random(7, 3), random(7, 3)

    def call(x):
        own = {name: value.clone() for name, value in layer.named_buffers()}
        return functional_call(layer, own, (x,)).sin().sum()

    asked = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(asked), asked)
    with torch.set_grad_enabled(with_grad):
        assert_close(jvp(call, (x,), (tangent,))[1], (gradient * tangent).sum())


def test_stacked_models_with_vmap_are_each_of_them():
    models: list[Any] = [layer_of((7, 3), Ramp(1, 1.5, 0, 4), 0.5, running=some_running()) for _ in range(3)]
    for step, model in enumerate(models):
        nn.init.uniform_(model.weight)
        model.num_batches_tracked.fill_(step)  # the limits differ
    parameters, buffers = stack_module_state(models)
    x = random(3, 7, 3)

    def loss(parameters, buffers, x):
        return functional_call(models[0], (parameters, buffers), (x,)).sin().sum()

    found = vmap(grad(loss, argnums=(0, 2)))(parameters, buffers, x)
    for i, model in enumerate(models):
        (one,) = asking(x[i])
        expected = torch.autograd.grad(model(one).sin().sum(), [*model.parameters(), one])
        assert_close(
            [*(found[0][name][i] for name, _ in model.named_parameters()), found[1][i]], list(expected)
        )
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert_close(buffers[name][i], model.get_buffer(name))


@pytest.mark.slow
@pytest.mark.parametrize("rmax", [1.2, Ramp(1, 1.5, 0, 4)], ids=["number", "ramp"])
def test_compiled_as_one_graph_it_equals_eager(rmax):
    torch._dynamo.reset()
    layer = layer_of((5, 3, 4), rmax, 0.5, torch.float32, some_running(), activation="relu")
    compiled: Any = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x, residual = (random(5, 3, 4, dtype=torch.float32) for _ in range(2))
        dy, found = torch.randn(5, 3, 4), []
        for model in (layer, compiled):
            given = asking(x, residual)
            y = model(*given)
            found.append([y, *torch.autograd.grad(y, [*given, *model.parameters()], dy)])
        assert_close(*found)
    assert_close(compiled._orig_mod.state_dict(), layer.state_dict())


# --- what is refused, and what is left alone


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((0.99,), "at least 1"),
        ((-3,), "at least 1"),
        ((3, -0.1), "at least 0"),
        ((float("nan"),), "at least 1"),
    ],
)
def test_limits_that_are_none(limits, message):
    with pytest.raises(ValueError, match=message):
        bn.Renorm(*limits)


@pytest.mark.parametrize(("begin", "end"), [(5, 5), (5, 4), (-1, 3)])
def test_a_ramp_that_ends_before_it_begins(begin, end):
    with pytest.raises(ValueError, match="begins before it ends"):
        Ramp(1, 3, begin, end)


def test_a_layer_without_running_statistics_has_nothing_to_correct_towards():
    layer = bn.BatchNorm1d(3, statistics=bn.Renorm(), track_running_stats=False)
    with pytest.raises(RuntimeError, match="track_running_stats=True"):
        layer(torch.randn(4, 3))
    layer.eval()(torch.randn(4, 3))


@each_kernels
def test_one_value_per_channel_is_refused(kernels):
    layer = bn.BatchNorm1d(3, statistics=bn.Renorm())
    with bn.kernels.use(kernels), pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 3))
    assert layer.num_batches_tracked == 0


def test_an_empty_batch_is_a_plain_layer_s():
    layer, x = bn.BatchNorm1d(3, statistics=bn.Renorm()), torch.randn(0, 3, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 3)
    y.sum().backward()
    assert layer.num_batches_tracked == 0


def test_evaluation_is_a_plain_layer_s():
    layer, plain = layer_of((5, 3), dtype=torch.float32), bn.BatchNorm1d(3, EPS)
    layer(torch.randn(5, 3))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(layer.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_would_see_other_statistics_and_is_refused(reentrant):
    layer = bn.BatchNorm1d(3, statistics=bn.Renorm())
    x = torch.randn(6, 3, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="Renorm cannot be combined with activation checkpointing"):
        y.sum().backward()


@pytest.mark.slow
def test_inductor_keeps_the_correction_for_the_backward_pass():
    torch._dynamo.reset()
    x, dy = random(13, 3, 5), random(13, 3, 5)

    def gradients(compile):
        layer = bn.BatchNorm1d(3, statistics=bn.Renorm(1.5, 0.25), dtype=torch.float64, activation="sigmoid")
        layer.get_buffer("running_mean").add_(0.1)
        leaf = x.clone().requires_grad_()
        y = (torch.compile(layer, fullgraph=True) if compile else layer)(leaf)
        return torch.autograd.grad(y, [leaf, layer.weight, layer.bias], dy)

    assert_close(gradients(True), gradients(False), rtol=1e-12, atol=1e-12)


def test_a_limit_that_is_a_function_goes_no_lower_than_a_number_may():
    layer = bn.BatchNorm1d(3, statistics=bn.Renorm(lambda step: 0.5, lambda step: -1.0))
    x = torch.randn(8, 3)
    assert_close(layer(x), bn.BatchNorm1d(3)(x))
