"""Masks against torch's batch norm of the valid values alone, packed."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.testing import assert_close

import batchnorm as bn
from tests.statistics.inputs import KERNELS, asking, assert_near, each_kernels, outcome, random

ACTIVATIONS: dict[Any, Any] = {
    None: lambda z: z,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    nn.LeakyReLU(0.2): lambda z: F.leaky_relu(z, 0.2),
    nn.Hardtanh(): F.hardtanh,
}
LAYERS: dict[int, Any] = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}


def mask_for(*shape):
    """Of (N, 1, *S), a third of it padding."""
    mask = torch.rand(shape[0], 1, *shape[2:]) < 2 / 3
    mask.flatten()[:2] = True
    mask.flatten()[-1] = False
    return mask


def normal(x, mask, weight=None, bias=None):
    """The batch norm of the valid values as a batch of samples without positions; elsewhere 0."""
    valid = mask.expand(len(x), 1, *x.shape[2:])[:, 0]
    rows = x.movedim(1, -1)
    packed = F.batch_norm(rows[valid], None, None, weight, bias, training=True)
    return torch.zeros_like(rows).masked_scatter(valid[..., None], packed).movedim(-1, 1)


def oracle(x, weight, bias, residual, *, mask, activation=None):
    """Of float64 tensors."""
    return torch.where(mask, ACTIVATIONS[activation](normal(x, mask, weight, bias) + residual), 0)


def given_to(shape, dtype=torch.float64, layout="contiguous"):
    x, residual = (random(*shape, layout=layout, dtype=dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [x, (torch.rand(shape[1]) + 0.5).to(wide), torch.randn(shape[1]).to(wide), residual]


def function(mask, activation=None):
    def call(x, weight, bias, residual):
        return bn.batch_norm(
            x, None, None, weight, bias, True, mask=mask, activation=activation, residual=residual
        )

    return call


def check(shape, kernels, mask=None, dtype=torch.float64, layout="contiguous", activation=None):
    mask = mask_for(*shape) if mask is None else mask
    given, dy = given_to(shape, dtype, layout), random(*shape, layout=layout, dtype=dtype)
    wide = asking(*given, dtype=torch.float64)
    if activation is not None:  # around a kink a gradient is anybody's
        z = oracle(*wide, mask=mask)
        dy = torch.where((z.abs() < 0.05) | ((z.abs() - 1).abs() < 0.05), 0, dy)
    expected = outcome(lambda *t: oracle(*t, mask=mask, activation=activation), wide, dy.double())
    with bn.kernels.use(kernels):
        found = outcome(function(mask, activation), [t.requires_grad_() for t in given], dy)
    assert found[0].dtype == dtype
    assert_near(found, expected, dtype)
    for t in (found[0], found[1], found[4]):
        assert not t[~mask.expand(shape)].any()  # exactly


@each_kernels
@pytest.mark.parametrize("shape", [(9, 4), (5, 3, 7), (4, 3, 5, 6), (3, 2, 3, 4, 2), (40, 17), (6, 1, 50)])
def test_outputs_and_gradients_are_those_of_the_valid_values_alone(shape, kernels):
    check(shape, kernels)


@each_kernels
@pytest.mark.parametrize("layout", ["channels_last", "slice"])
@pytest.mark.parametrize("shape", [(9, 4), (4, 3, 5, 6)])
def test_of_any_layout(shape, layout, kernels):
    check(shape, kernels, layout=layout)


@each_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_narrow_types(dtype, layout, kernels):
    check((6, 5, 7, 4), kernels, dtype=dtype, layout=layout)


@each_kernels
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a], ids=str)
def test_with_an_activation(activation, kernels):
    check((6, 3, 5), kernels, activation=activation)


@pytest.mark.parametrize("size", [(1, 1, 7), (5, 1, 1), (1, 1, 1)])
def test_a_mask_is_broadcast(size):
    mask = torch.rand(size) < 0.7
    mask.flatten()[0] = True
    check((5, 3, 7), "native" if "native" in KERNELS else "reference", mask)


@each_kernels
def test_lengths_are_the_mask_of_the_first_so_many(kernels):
    x, layer = random(4, 3, 6), bn.BatchNorm1d(3, dtype=torch.float64)
    mask = torch.zeros(4, 1, 6, dtype=torch.bool)
    for sample, length in zip(mask, (6, 1, 0, 4), strict=True):
        sample[:, :length] = True
    with bn.kernels.use(kernels):
        expected = layer(x, mask=mask)
        for dtype in (torch.int64, torch.int32):
            lengths = torch.tensor([6, 1, 0, 4], dtype=dtype)
            assert torch.equal(layer(x, mask=lengths), expected)
            assert torch.equal(bn.batch_norm(x, None, None, training=True, mask=lengths), expected)


@pytest.mark.parametrize("kernels", [k for k in KERNELS if k != "torch"])
def test_a_mask_of_nothing_but_valid_values_changes_nothing(kernels):
    shape = (5, 3, 7)
    given, dy = given_to(shape), random(*shape)
    with bn.kernels.use(kernels):
        found, expected = [
            outcome(function(mask, "relu"), asking(*given), dy) for mask in (None, torch.ones(5, 1, 7) > 0)
        ]
    assert_near(found, expected, torch.float64)


# --- what lies under the mask


@each_kernels
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("activation", [None, "relu", "sigmoid"])
@pytest.mark.parametrize("statistics", [None, bn.Ghost(2), bn.Renorm()], ids=str)
def test_garbage_under_the_mask_changes_no_bit(statistics, activation, garbage, kernels):
    shape = (5, 3, 7)
    layer = bn.BatchNorm1d(3, activation=activation, statistics=statistics)
    mask, given, dy = mask_for(*shape), given_to(shape, torch.float32), random(*shape, dtype=torch.float32)

    def spoilt(t):
        return torch.where(mask, t, garbage) if t.shape == shape else t

    found = []
    with bn.kernels.use(kernels):
        for change in (lambda t: t, spoilt):
            own = copy.deepcopy(layer)

            def call(x, weight, bias, residual, own=own):
                return functional_call(own, {"weight": weight, "bias": bias}, (x, residual, mask))

            found.append([*outcome(call, asking(*map(change, given)), change(dy)), *own.buffers()])
    assert all(t.isfinite().all() for t in found[0])
    assert all(map(torch.equal, *found))


@each_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mean_of_1e4_keeps_its_digits(layout, kernels):
    # the input is 0 under the mask, far from the mean
    shape = (16, 4, 9, 8)
    x, mask = (random(*shape, layout=layout) + 1e4).float(), mask_for(*shape)
    layer = bn.BatchNorm2d(4, momentum=1.0, dtype=torch.float64)
    with bn.kernels.use(kernels):
        y = bn.batch_norm(x, layer.running_mean, layer.running_var, training=True, momentum=1.0, mask=mask)
    assert_close(y.double(), normal(x.double(), mask), rtol=0, atol=1e-5)
    mean, var = by_definition(x.double(), mask)
    assert_close(layer.running_mean, mean, rtol=1e-9, atol=0)
    assert_close(layer.running_var, var, rtol=1e-5, atol=0)


@each_kernels
def test_a_mean_that_is_rounded_is_no_part_of_the_variance(kernels):
    # In bfloat16 numbers near 100 are 0.5 apart, and so is what stands under the mask from the mean.
    x, mask = (random(16, 40, 30) + 100).bfloat16(), mask_for(16, 40, 30)
    layer = bn.BatchNorm1d(40, momentum=1.0, dtype=torch.float64)
    with bn.kernels.use(kernels):
        layer(x, mask=mask)
    mean, var = by_definition(x.double(), mask)
    assert_close(layer.running_mean, mean, rtol=1e-6, atol=0)
    assert_close(layer.running_var, var, rtol=1e-4, atol=0)


@each_kernels
def test_equal_values_have_no_variance_and_never_a_negative_one(kernels):
    for size in range(2, 40):
        layer: Any = bn.BatchNorm1d(64, momentum=1.0, eps=1e-30)
        x, mask = torch.randn(64, 1).expand(size, 64, size).contiguous(), mask_for(size, 64, size)
        with bn.kernels.use(kernels):
            y = layer(x, mask=mask)
        assert y.isfinite().all()
        assert (layer.running_var >= 0).all()
        assert (layer.running_var.sqrt() <= 1e-6).all()


# --- running statistics


def by_definition(x, mask):
    """Mean and unbiased variance of the valid values of each channel."""
    values = x.movedim(1, -1)[mask.expand(len(x), 1, *x.shape[2:])[:, 0]]
    return values.mean(0), values.var(0, correction=1)


@each_kernels
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("statistics", [None, bn.Ghost(2), bn.Renorm()], ids=str)
def test_running_statistics_in_closed_form(statistics, momentum, kernels):
    layer = bn.BatchNorm2d(3, momentum=momentum, statistics=statistics, dtype=torch.float64)
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    with bn.kernels.use(kernels):
        for step in range(3):
            x, mask = random(5, 3, 4, 3) + step, mask_for(5, 3, 4, 3)
            layer(x, mask=mask)
            share = momentum or 1 / (step + 1)
            batch = by_definition(x, mask)
            mean, var = (old.lerp(new, share) for old, new in zip((mean, var), batch, strict=True))
    assert_close([layer.running_mean, layer.running_var], [mean, var], rtol=1e-11, atol=1e-11)
    assert layer.num_batches_tracked == 3


@each_kernels
@pytest.mark.parametrize("statistics", [None, bn.Ghost(2), bn.Renorm()], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "sigmoid"])
def test_padding_alone_comes_out_as_0_and_enters_nothing(activation, statistics, kernels):
    layer = bn.BatchNorm1d(3, statistics=statistics, activation=activation)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    given = asking(*(random(5, 3, 4, dtype=torch.float32) for _ in range(2)))
    with bn.kernels.use(kernels):
        y = layer(*given, torch.zeros(5, 1, 4, dtype=torch.bool))
        assert not y.any()
        y.sum().backward()
    for t in (*given, *layer.parameters()):
        assert not t.grad.any()
    assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)  # num_batches_skipped among them


@each_kernels
@pytest.mark.parametrize("statistics", [None, bn.Ghost(2), bn.Renorm()], ids=str)
def test_one_valid_value_is_refused(statistics, kernels):
    mask = torch.zeros(4, 1, 5, dtype=torch.bool)
    mask[0, 0, 3] = True
    x, layer = torch.randn(4, 3, 5), bn.BatchNorm1d(3, statistics=statistics)
    with bn.kernels.use(kernels):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(x, mask=mask)
        assert layer.num_batches_tracked == 0
        layer.on_single = "running"
        nn.init.normal_(layer.get_buffer("running_mean"))
        before = layer.get_buffer("running_mean").clone()
        assert torch.equal(layer(x, mask=mask), copy.deepcopy(layer).eval()(x, mask=mask))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.get_buffer("running_mean"), before)


@each_kernels
def test_evaluation_by_running_statistics_leaves_padding_at_0(kernels):
    layer = bn.BatchNorm2d(3, activation="sigmoid", dtype=torch.float64)
    layer(random(5, 3, 4, 2))
    layer.eval()
    (x, residual), mask = asking(random(5, 3, 4, 2), random(5, 3, 4, 2)), mask_for(5, 3, 4, 2)
    with bn.kernels.use(kernels):
        y = layer(torch.where(mask, x, torch.nan), residual, mask=mask)
        expected = torch.where(mask, layer(x, residual), 0)
        assert_close(y, expected)
        of = [x, residual, *layer.parameters()]
        assert_close(*(torch.autograd.grad(t.sin().sum(), of) for t in (y, expected)))
    assert layer.num_batches_tracked == 1


def test_without_running_statistics_evaluation_takes_the_valid_values():
    layer = bn.BatchNorm1d(3, track_running_stats=False, dtype=torch.float64).eval()
    x, mask = random(5, 3, 4), mask_for(5, 3, 4)
    assert_close(layer(x, mask=mask), normal(x, mask))


# --- with ghost batches


@each_kernels
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("samples", "layout"), [(8, "contiguous"), (9, "channels_last"), (3, "contiguous")])
def test_each_ghost_batch_has_its_own_valid_values(samples, layout, activation, kernels):
    shape = (samples, 3, 4, 5)
    mask = mask_for(*shape)
    mask[:2] = False  # a group that is all padding
    mask[2:4].fill_(True)
    groups = [slice(2 * i, 2 * i + 2) for i in range(samples // 2)]
    groups[-1] = slice(groups[-1].start, samples)
    given, dy = given_to(shape, layout=layout), random(*shape)
    wide = asking(*given)
    z = torch.cat([oracle(wide[0][g], wide[1], wide[2], wide[3][g], mask=mask[g]) for g in groups])
    dy = torch.where(z.abs() < 0.05, 0, dy)
    layer = bn.BatchNorm2d(3, activation=activation, statistics=bn.Ghost(2), dtype=torch.float64)

    def call(x, weight, bias, residual):
        return functional_call(layer, {"weight": weight, "bias": bias}, (x, residual, mask))

    def each(x, weight, bias, residual):
        return torch.cat(
            [oracle(x[g], weight, bias, residual[g], mask=mask[g], activation=activation) for g in groups]
        )

    with bn.kernels.use(kernels):
        found = outcome(call, asking(*given), dy)
    assert_near(found, outcome(each, wide, dy), torch.float64)


# --- autograd's other ways, torch.func, compilers


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [k for k in KERNELS if k != "torch"])
@pytest.mark.parametrize("statistics", [None, bn.Ghost(2)], ids=str)
def test_gradients_of_the_first_and_the_second_order(statistics, kernels):
    layer = bn.BatchNorm1d(
        2, activation="leaky_relu", statistics=statistics, track_running_stats=False, dtype=torch.float64
    )
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 1, 1]]).bool()[:, None]

    def call(x, weight, bias, residual):
        return functional_call(layer, {"weight": weight, "bias": bias}, (x, residual, mask))

    given = asking(*given_to((4, 2, 3)))
    with bn.kernels.use(kernels):
        assert gradcheck(call, given)
        assert gradgradcheck(call, given)


@pytest.mark.parametrize("kernels", [k for k in KERNELS if k != "torch"])
@pytest.mark.parametrize("statistics", [None, bn.Ghost(2), bn.Renorm()], ids=str)
def test_a_gradient_that_keeps_its_graph_is_the_same_gradient(statistics, kernels):
    shape = (7, 3, 5)
    layer = bn.BatchNorm1d(3, activation="relu", statistics=statistics, momentum=0.0, dtype=torch.float64)
    given, mask = asking(random(*shape), random(*shape)), mask_for(*shape)
    of = [*given, *layer.parameters()]
    with bn.kernels.use(kernels):
        found = [
            torch.autograd.grad(layer(*given, mask).sin().sum(), of, create_graph=keep)
            for keep in (False, True)
        ]
    assert_close(*found)


@pytest.mark.parametrize("statistics", [None, bn.Ghost(2), bn.Renorm()], ids=str)
def test_stacked_models_with_vmap_are_each_of_them(statistics):
    models: list[Any] = [bn.BatchNorm1d(3, statistics=statistics, dtype=torch.float64) for _ in range(3)]
    for model in models:
        nn.init.uniform_(model.weight)
    parameters, buffers = stack_module_state(models)
    x, masks = random(3, 5, 3, 4), torch.stack([mask_for(5, 3, 4) for _ in range(3)])

    def loss(parameters, buffers, x, mask):
        return functional_call(models[0], (parameters, buffers), (x,), {"mask": mask}).sin().sum()

    found = vmap(grad(loss))(parameters, buffers, x, masks)
    for i, model in enumerate(models):
        loss_of_one = model(x[i], mask=masks[i]).sin().sum()
        expected = torch.autograd.grad(loss_of_one, list(model.parameters()))
        assert_close([found[name][i] for name, _ in model.named_parameters()], list(expected))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert_close(buffers[name][i], model.get_buffer(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statistics", "lengths"),
    [(None, False), (None, True), (bn.Ghost(2), False), (bn.Renorm(), False)],
    ids=str,
)
def test_compiled_as_one_graph_it_equals_eager(statistics, lengths):
    torch._dynamo.reset()
    layer = bn.BatchNorm1d(3, activation="relu", statistics=statistics)
    compiled: Any = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for samples in (5, 8) if statistics is None else (5,):
        x, residual = (random(samples, 3, 4, dtype=torch.float32) for _ in range(2))
        mask = torch.randint(2, 5, (samples,)) if lengths else mask_for(samples, 3, 4)
        dy, found = torch.randn(samples, 3, 4), []
        for model in (layer, compiled):
            given = asking(x, residual)
            y = model(*given, mask=mask)
            found.append([y, *torch.autograd.grad(y, [*given, *model.parameters()], dy)])
        assert_close(*found)
    assert_close(compiled._orig_mod.state_dict(), layer.state_dict())


# --- what is refused

BOOL = torch.ones(5, 1, 4, dtype=torch.bool)
REFUSED = [
    (torch.ones(5, 1, 4), TypeError, r"bool tensor .* use mask.bool\(\)"),
    (torch.ones(5, 1, 4, dtype=torch.int64), TypeError, "lengths of sequences"),
    (torch.ones(4, dtype=torch.int64), TypeError, "lengths of sequences"),
    (torch.ones(5), TypeError, "lengths of sequences"),
    (BOOL[:, 0], ValueError, r"mask.unsqueeze\(1\)"),
    (BOOL.expand(5, 3, 4), ValueError, "broadcast to"),
    (BOOL[:4], ValueError, "broadcast to"),
    (BOOL[:, :, :3], ValueError, "broadcast to"),
]


@pytest.mark.parametrize(("mask", "error", "message"), REFUSED)
def test_a_mask_of_another_shape_or_type_is_refused_with_advice(mask, error, message):
    layer, x = bn.BatchNorm1d(3), torch.randn(5, 3, 4)
    with pytest.raises(error, match=message):
        layer(x, mask=mask)
    with pytest.raises(error, match=message):
        bn.batch_norm(x, None, None, training=True, mask=mask)
    assert layer.num_batches_tracked == 0


def test_lengths_are_of_sequences_alone():
    with pytest.raises(TypeError, match=r"\(N, C, L\)"):
        bn.BatchNorm2d(3)(torch.randn(5, 3, 4, 4), mask=torch.ones(5, dtype=torch.int64))


def test_an_activation_that_overflows_in_the_padding_reaches_no_gradient():
    layer = bn.BatchNorm1d(2, activation=torch.exp)
    x = (torch.randn(4, 2, 50) - 100).requires_grad_()
    for training in (True, False):
        y = layer.train(training)(x if training else x + 100, mask=torch.tensor([50, 20, 40, 10]))
        gradients = torch.autograd.grad(y.sum(), [x, layer.weight, layer.bias])
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("valid", [8, 64, 1000])
def test_a_few_values_in_a_sea_of_padding_keep_their_digits(valid):
    x, mask = torch.randn(64, 8, 8192), torch.zeros(64, 1, 8192, dtype=torch.bool)
    mask.view(-1)[torch.randperm(mask.numel())[:valid]] = True
    y = bn.BatchNorm1d(8)(x, mask=mask)
    packed = x.movedim(1, -1)[mask[:, 0]].double()
    expected = torch.nn.functional.batch_norm(packed, None, None, training=True)
    assert_close(y.movedim(1, -1)[mask[:, 0]].double(), expected, rtol=2e-6, atol=2e-6)


def test_a_mask_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"torch\.as_tensor"):
        bn.BatchNorm1d(3)(torch.randn(2, 3, 4), mask=[4, 2])


def test_nothing_counts_no_batch():
    for shape in ((4, 0, 4), (4, 3, 0), (0, 3, 4)):
        for statistics in (None, bn.Ghost(2)):
            layer = bn.BatchNorm1d(shape[1], statistics=statistics)
            layer(torch.randn(shape), mask=torch.ones(shape[0], 1, shape[2], dtype=torch.bool))
            layer(torch.randn(shape))
            assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("lengths", [[9, 3], [4, -1]])
def test_lengths_that_the_input_cannot_have_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths must be from 0 to 4"):
        bn.BatchNorm1d(3)(torch.randn(2, 3, 4), mask=torch.tensor(lengths))
