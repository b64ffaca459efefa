"""Ghost batches against torch's batch norm of each group by itself."""

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.testing import assert_close

import batchnorm as bn
from tests.kernels.observer import Observer
from tests.statistics.inputs import (
    KERNELS,
    asking,
    assert_near,
    each_kernels,
    native_only,
    outcome,
    random,
)

LAYERS: dict[int, Any] = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}
ACTIVATIONS: dict[Any, Any] = {
    None: lambda z: z,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
}


def split(x, size):
    """The groups, by hand: as many of `size` as there are, the last one with what is left over."""
    starts = list(range(0, len(x) - size + 1, size)) or [0]
    return [x[a:b] for a, b in itertools.zip_longest(starts, starts[1:])]


def oracle(x, weight, bias, residual, *, size, activation=None):
    """Of float64 tensors."""
    normal = [F.batch_norm(part, None, None, weight, bias, training=True) for part in split(x, size)]
    return ACTIVATIONS[activation](torch.cat(normal) + residual)


def layer_of(x, size, activation=None, **options):
    return LAYERS[x.dim()](
        x.size(1), activation=activation, statistics=bn.Ghost(size), dtype=x.dtype, **options
    )


def given_to(layer, shape, dtype=torch.float64, layout="contiguous"):
    x, residual = (random(*shape, layout=layout, dtype=dtype) for _ in range(2))
    weight, bias = (t.to(layer.weight.dtype) for t in (torch.rand(shape[1]) + 0.5, torch.randn(shape[1])))
    return [x, weight, bias, residual]


def called(layer):
    def call(x, weight, bias, residual):
        return functional_call(layer, {"weight": weight, "bias": bias}, (x, residual))

    return call


def check(shape, size, kernels, dtype=torch.float64, layout="contiguous", activation=None):
    layer = layer_of(torch.empty(shape, dtype=dtype), size, activation)
    given, dy = given_to(layer, shape, dtype, layout), random(*shape, layout=layout, dtype=dtype)
    wide = asking(*given, dtype=torch.float64)
    if activation in ("relu", "leaky_relu"):  # around the kink a gradient is anybody's
        dy = torch.where(oracle(*wide, size=size).abs() < 0.05, 0, dy)
    expected = outcome(lambda *t: oracle(*t, size=size, activation=activation), wide, dy.double())
    with bn.kernels.use(kernels):
        asked = [t.requires_grad_() for t in given]
        found = outcome(called(layer), asked, dy)
    assert [t.dtype for t in found] == [dtype, *(t.dtype for t in given)]
    assert_near(found, expected, dtype)


# The last group is larger, or is not; there is one group; a group of one sample, which has positions.
SHAPES_AND_SIZES = [
    ((7, 3), 3),
    ((9, 5), 2),
    ((6, 3), 6),
    ((5, 3), 4),
    ((4, 3), 9),
    ((3, 4, 5), 1),
    ((7, 2, 4), 2),
    ((8, 3, 2, 5), 2),
    ((5, 17, 7, 6), 2),
    ((7, 2, 3, 2, 4), 3),
]


@each_kernels
@pytest.mark.parametrize(("shape", "size"), SHAPES_AND_SIZES)
def test_outputs_and_gradients_are_those_of_each_group_alone(shape, size, kernels):
    check(shape, size, kernels)


@each_kernels
@pytest.mark.parametrize("layout", ["channels_last", "slice", "samples_last"])
@pytest.mark.parametrize(
    ("shape", "size"), [((7, 3), 3), ((7, 3, 4), 2), ((7, 5, 3, 4), 3), ((5, 3, 2, 3, 2), 2)]
)
def test_of_any_layout(layout, shape, size, kernels):
    check(shape, size, kernels, layout=layout)


@each_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_of_narrow_types(dtype, layout, kernels):
    check((11, 6, 3, 4), 3, kernels, dtype, layout)


@each_kernels
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_with_an_activation(activation, dtype, kernels):
    check((7, 3, 2, 5), 3, kernels, dtype, activation=activation)


@each_kernels
def test_without_weight_bias_and_residual(kernels):
    x = random(7, 3, 4).requires_grad_()
    expected = torch.cat([F.batch_norm(part, None, None, training=True) for part in split(x, 3)])
    with bn.kernels.use(kernels):
        layer = layer_of(x, 3, affine=False)
        y = layer(x)
        assert_close(y, expected)
        assert_close(*(torch.autograd.grad(t.sin().sum(), x) for t in (y, expected)))


@each_kernels
def test_a_mean_of_1e4_keeps_its_digits(kernels):
    x = (random(32, 4, 6) + 1e4).float()
    with bn.kernels.use(kernels):
        y = layer_of(x, 5)(x)
    expected = torch.cat([F.batch_norm(p, None, None, training=True) for p in split(x.double(), 5)])
    assert_close(y.double(), expected, rtol=0, atol=1e-5)


# --- running statistics


def by_definition(x):
    values = x.movedim(1, 0).flatten(1)
    return values.mean(1), values.var(1, correction=1)


@each_kernels
@pytest.mark.parametrize(("samples", "size"), [(8, 2), (7, 3), (3, 5), (5, 1)])
def test_running_statistics_follow_the_whole_batch(samples, size, kernels):
    layer = layer_of(random(samples, 3, 4), size, momentum=0.3)
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    with bn.kernels.use(kernels):
        for step in range(3):
            # the groups' means are far apart
            x = random(samples, 3, 4) + step + 5 * torch.arange(samples).double().reshape(-1, 1, 1)
            layer(x)
            batch = by_definition(x)
            mean, var = (0.7 * old + 0.3 * new for old, new in zip((mean, var), batch, strict=True))
    assert_close([layer.running_mean, layer.running_var], [mean, var], rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == 3


def test_a_batch_with_an_inf_in_one_group_does_not_enter():
    layer, x = bn.BatchNorm1d(3, statistics=bn.Ghost(2)), random(6, 3).float()
    x[0, 0] = torch.inf
    with pytest.warns(RuntimeWarning, match="inf or nan"):
        y = layer(x)
    assert y[2:].isfinite().all()  # the other groups never met it
    assert layer.num_batches_tracked == 0 and layer.num_batches_skipped == 1
    assert_close(layer.running_mean, torch.zeros(3), rtol=0, atol=0)


def test_evaluation_is_a_plain_layer_s():
    layer, plain = bn.BatchNorm2d(3, statistics=bn.Ghost(2)), bn.BatchNorm2d(3)
    for _ in range(2):
        layer(random(6, 3, 2, 4, dtype=torch.float32))
    plain.load_state_dict(layer.state_dict())
    x = random(5, 3, 2, 4, dtype=torch.float32)
    assert torch.equal(layer.eval()(x), plain.eval()(x))


def test_without_running_statistics_evaluation_takes_the_whole_batch():
    layer, x = bn.BatchNorm1d(3, statistics=bn.Ghost(2), track_running_stats=False), random(6, 3).float()
    assert torch.equal(layer.eval()(x), bn.batch_norm(x, None, None, layer.weight, layer.bias, training=True))


# --- the bits, and how often the kernels are called


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "size", "layout"),
    [
        ((8, 16, 20, 20), 2, "contiguous"),
        ((8, 16, 20, 20), 4, "channels_last"),
        ((64, 700), 16, "contiguous"),
        ((8, 5, 9), 4, "slice"),
        ((9, 33, 31, 20), 4, "contiguous"),
    ],
)
def test_the_bits_are_those_of_each_group_alone_for_any_number_of_threads(shape, size, layout, dtype):
    layer = layer_of(torch.empty(shape), size, "relu")
    given, dy = given_to(layer, shape, dtype, layout), random(*shape, layout=layout, dtype=dtype)
    weight, bias = given[1:3]
    threads, outcomes = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes.append(outcome(called(layer), asking(*given), dy))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], other))
    plain: Any = LAYERS[len(shape)](shape[1], activation="relu", track_running_stats=False)
    alone = [
        outcome(called(plain), asking(x, weight, bias, residual), part)
        for x, residual, part in zip(*(split(t, size) for t in (given[0], given[3], dy)), strict=True)
    ]
    for i in (0, 1, 4):
        assert torch.equal(outcomes[0][i], torch.cat([one[i] for one in alone]))


@native_only
@pytest.mark.parametrize("samples", [4, 8, 33])
def test_one_native_call_each_way_whatever_the_number_of_groups(samples, monkeypatch):
    from batchnorm.kernels import native

    calls: list[str] = []

    class Counted:
        def __getattr__(self, name):
            if name in ("forward", "backward"):  # what walks through the batch
                calls.append(name)
            return getattr(kernels, name)

    kernels = native._native  # type: ignore[attr-defined]
    monkeypatch.setattr(native, "_native", Counted())
    layer = bn.BatchNorm1d(3, statistics=bn.Ghost(2), activation="relu", track_running_stats=False)
    with bn.kernels.use("native"):
        y = layer(random(samples, 3, 4, dtype=torch.float32).requires_grad_())
        assert calls == ["forward"]
        y.sum().backward()
    assert calls == ["forward", "backward"]


# --- autograd's other ways, and torch.func


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [k for k in KERNELS if k != "torch"])
@pytest.mark.parametrize(("shape", "size"), [((5, 2), 2), ((3, 2, 2), 1), ((4, 2, 2), 2)])
def test_gradients_of_the_first_and_the_second_order(shape, size, kernels):
    layer = layer_of(torch.empty(shape).double(), size, "leaky_relu", track_running_stats=False)
    given = asking(*given_to(layer, shape))
    with bn.kernels.use(kernels):
        assert gradcheck(called(layer), given)
        assert gradgradcheck(called(layer), given)


@pytest.mark.parametrize("way", [nullcontext, Observer])
@pytest.mark.parametrize("kernels", [k for k in KERNELS if k != "torch"])
def test_a_gradient_that_keeps_its_graph_is_the_same_gradient(kernels, way):
    given, dy = asking(*given_to(layer_of(torch.empty(7, 3, 4), 3), (7, 3, 4))), random(7, 3, 4)
    call = called(layer_of(dy, 3, "relu"))
    with bn.kernels.use(kernels), way():
        found = [torch.autograd.grad(call(*given), given, dy, create_graph=keep) for keep in (False, True)]
    assert_close(*found)


def test_stacked_models_with_vmap_are_each_of_them():
    models: list[Any] = [
        bn.BatchNorm1d(3, statistics=bn.Ghost(2), activation="relu", dtype=torch.float64) for _ in range(3)
    ]
    for model in models:
        nn.init.uniform_(model.weight)
    parameters, buffers = stack_module_state(models)
    x = random(3, 7, 3)

    def loss(parameters, buffers, x):
        return functional_call(models[0], (parameters, buffers), (x,)).sin().sum()

    found = vmap(grad(loss))(parameters, buffers, x)
    for i, model in enumerate(models):
        expected = torch.autograd.grad(model(x[i]).sin().sum(), list(model.parameters()))
        assert_close([found[name][i] for name, _ in model.named_parameters()], list(expected))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert_close(buffers[name][i], model.get_buffer(name))


# --- compilers


def operators():
    return torch.ops.batchnorm.forward.default, torch.ops.batchnorm.backward.default


# torch's own check reads .grad of its copies.
checks = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.mark.slow
@native_only
@checks
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(("dtype", "affine"), [(torch.float32, True), (torch.bfloat16, False)])
def test_the_operators_pass_torch_s_checks(group, dtype, affine):
    forward, backward = operators()
    x, residual, dy = (random(7, 3, 2, 2, dtype=dtype) for _ in range(3))
    weight, bias = (torch.rand(2, 3) + 0.5).unbind() if affine else (None, None)
    given = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    torch.library.opcheck(forward, (*given, None, None, 1e-3, 1, 0.0, group))
    y, stats = forward(x, weight, bias, residual, None, None, 1e-3, 1, 0.0, group)
    assert stats.shape == (2, 7 // group, 3)
    torch.library.opcheck(backward, (dy, x, y, weight, bias, stats, False, 1e-3, 1, 0.0, group))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_compiled_as_one_graph_it_equals_eager(activation):
    torch._dynamo.reset()
    layer = layer_of(torch.empty(7, 3, 4), 3, activation)
    compiled: Any = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for samples in (7, 8, 12):
        x, residual = (random(samples, 3, 4, dtype=torch.float32) for _ in range(2))
        dy = torch.randn(samples, 3, 4)
        found = []
        for model in (layer, compiled):
            given = asking(x, residual)
            y = model(*given)
            found.append([y, *torch.autograd.grad(y, [*given, *model.parameters()], dy)])
        assert_close(*found)
    assert_close(compiled._orig_mod.state_dict(), layer.state_dict())


@pytest.mark.slow
@native_only
def test_the_compiler_s_graph_holds_the_operator():
    torch._dynamo.reset()
    seen: list[Any] = []

    def backend(module, inputs):
        seen.extend(node.target for node in module.graph.nodes)
        return module.forward

    layer = bn.BatchNorm1d(3, statistics=bn.Ghost(2))
    torch.compile(layer, backend=backend, fullgraph=True)(torch.randn(7, 3))
    assert sum("batchnorm.forward" in str(target) for target in seen) == 1


# --- what is refused


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_size_that_is_no_number_of_samples(size):
    with pytest.raises(ValueError, match="at least 1"):
        bn.Ghost(size)


@each_kernels
def test_one_value_per_channel_of_a_group(kernels):
    layer = bn.BatchNorm1d(3, statistics=bn.Ghost(1))
    with bn.kernels.use(kernels), pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(6, 3))
    assert layer.num_batches_tracked == 0


def test_one_value_per_channel_of_a_group_may_take_running_statistics():
    layer, x = bn.BatchNorm1d(3, statistics=bn.Ghost(1), on_single="running"), torch.randn(6, 3)
    nn.init.normal_(layer.get_buffer("running_mean"))
    assert torch.equal(layer(x), copy.deepcopy(layer).eval()(x))
    assert layer.num_batches_tracked == 0


def test_an_empty_batch_is_a_plain_layer_s():
    layer = bn.BatchNorm1d(3, statistics=bn.Ghost(2))
    assert layer(torch.randn(0, 3)).shape == (0, 3)
    assert layer.num_batches_tracked == 0


def test_it_is_a_value():
    assert bn.Ghost(4) == bn.Ghost(4) != bn.Ghost(5)
    assert "statistics=Ghost(size=4)" in repr(bn.BatchNorm1d(3, statistics=bn.Ghost(4)))
    with pytest.raises(AttributeError):
        bn.Ghost(4).size = 5  # type: ignore[misc]
