"""Statistics of each activation by itself: torch's batch norm of the flattened samples."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.testing import assert_close

import batchnorm as bn
from tests.statistics.inputs import TOLERANCE, asking, assert_near, each_kernels, outcome, random

CASES = [
    (bn.BatchNorm1d, (3,)),
    (bn.BatchNorm1d, (3, 4)),
    (bn.BatchNorm2d, (3, 4, 2)),
    (bn.BatchNorm3d, (3, 2, 2, 3)),
]
each_case = pytest.mark.parametrize(("layer", "features"), CASES, ids=["(C,)", "1d", "2d", "3d"])


def randomised(layer):
    """With a weight and a bias of their own everywhere."""
    for values in layer.parameters():
        nn.init.uniform_(values, 0.5, 1.5)
    return layer


def flat_twin(layer, **options):
    """Torch's layer of as many channels as there are activations, in float64, with the same values."""
    twin = nn.BatchNorm1d(layer.weight.numel(), layer.eps, layer.momentum, dtype=torch.float64, **options)
    values = {name: t.flatten() if t.dim() else t for name, t in layer.state_dict().items()}
    twin.load_state_dict(values)
    return twin.train(layer.training)


def check(layer, features, kernels, dtype=torch.float64, layout="contiguous", activation=None):
    ours = randomised(layer(features, activation=activation)).to(dtype)
    twin = flat_twin(ours)
    for training in (True, True, False):
        x, residual, dy = (random(6, *features, layout=layout, dtype=dtype) for _ in range(3))
        z = copy.deepcopy(twin).train(training)(x.double().flatten(1)).view_as(x) + residual.double()
        if activation == "relu":  # around the kink a gradient is anybody's
            dy = torch.where(z.abs() < 0.1, 0, dy)

        def call(x, residual, weight, bias):
            z = twin(x.flatten(1)).view_as(x) + residual
            return torch.relu(z) if activation == "relu" else z

        wide = asking(x, residual, dtype=torch.float64)
        for one in (ours, twin):
            one.train(training)
        expected = outcome(call, [*wide, twin.weight, twin.bias], dy.double())
        expected[3:] = [t.view(features) for t in expected[3:]]
        with bn.kernels.use(kernels):
            given = [*asking(x, residual), ours.weight, ours.bias]
            found = outcome(lambda x, residual, *_: ours(x, residual), given, dy)
        assert_near(found, expected, dtype)
    assert ours.running_mean.shape == ours.running_var.shape == features
    assert_close(ours.running_mean.double().flatten(), twin.running_mean, rtol=0, atol=TOLERANCE[dtype])
    assert_close(ours.running_var.double().flatten(), twin.running_var, rtol=TOLERANCE[dtype], atol=0)
    assert ours.num_batches_tracked == twin.num_batches_tracked == 2


@each_kernels
@each_case
def test_it_is_torch_s_layer_on_flattened_samples(layer, features, kernels):
    check(layer, features, kernels)


@each_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_of_any_layout_and_narrow_types_with_an_activation(layout, dtype, kernels):
    check(bn.BatchNorm2d, (3, 4, 5), kernels, dtype, layout, "relu")


def test_its_output_keeps_the_memory_format_or_is_at_least_right():
    x = random(6, 3, 4, 5, layout="channels_last")
    layer = bn.BatchNorm2d((3, 4, 5), dtype=torch.float64)
    assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"bias": False}, {"track_running_stats": False}], ids=str
)
def test_without_some_of_its_tensors(options):
    layer, x = bn.BatchNorm1d((3, 4), dtype=torch.float64, **options), random(6, 3, 4)
    expected = F.batch_norm(x.flatten(1), None, None, training=True).view_as(x)
    assert_close(layer(x), expected)
    shapes = {name: tuple(t.shape) for name, t in layer.state_dict().items() if t.dim()}
    assert set(shapes.values()) == {(3, 4)}


@each_case
def test_tensors_are_of_the_shape_of_a_sample(layer, features):
    ours = layer(features)
    expected = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), features)
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == {
        **expected,
        "num_batches_tracked": (),
    }
    assert f"{features}" in ours.extra_repr()


def test_running_statistics_in_closed_form():
    layer, mean, var = bn.BatchNorm1d((3, 4), dtype=torch.float64), torch.zeros(3, 4), torch.ones(3, 4)
    mean, var = mean.double(), var.double()
    for step in range(3):
        x = random(5, 3, 4) + step
        layer(x)
        mean, var = mean.lerp(x.mean(0), 0.1), var.lerp(x.var(0), 0.1)
    assert_close([layer.running_mean, layer.running_var], [mean, var], rtol=1e-13, atol=1e-13)


@each_kernels
def test_a_mask_is_of_positions_each_counted_for_itself(kernels):
    layer: Any = randomised(bn.BatchNorm1d((2, 4), dtype=torch.float64))
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()[
        :, None
    ]
    x, dy = random(5, 2, 4), random(5, 2, 4)
    running = [layer.running_mean.clone(), layer.running_var.clone()]
    (one,), expected_y = asking(x), torch.zeros(5, 2, 4).double()
    parts = []
    for position in range(4):
        valid = mask[:, 0, position]
        if valid.any():
            # torch's gradient is wrong for a weight with gaps in memory
            weight, bias = (t[:, position].contiguous() for t in (layer.weight, layer.bias))
            normal = F.batch_norm(one[valid, :, position], None, None, weight, bias, True)
            parts.append((normal * dy[valid, :, position]).sum())
            expected_y[valid, :, position] = normal.detach()
            # a position that is valid in no sample leaves its running statistics alone
            values = x[valid, :, position]
            for buffer, batch in zip(running, (values.mean(0), values.var(0)), strict=True):
                buffer[:, position].lerp_(batch, 0.1)
    expected = torch.autograd.grad(torch.stack(parts).sum(), [one, *layer.parameters()])
    with bn.kernels.use(kernels):
        (other,) = asking(torch.where(mask, x, torch.nan))
        y = layer(other, mask=mask)
        assert_close(y, expected_y)
        assert_close(torch.autograd.grad(y, [other, *layer.parameters()], dy), expected)
    assert_close([layer.running_mean, layer.running_var], running)
    assert layer.num_batches_tracked == 1 and layer.num_batches_skipped == 0


@each_kernels
def test_a_position_with_one_valid_value_is_refused(kernels):
    layer, mask = bn.BatchNorm1d((2, 3)), torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()[:, None]
    with bn.kernels.use(kernels), pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(2, 2, 3), mask=mask)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 2, 3))


@each_kernels
def test_ghost_batches(kernels):
    layer = randomised(bn.BatchNorm1d((3, 4), statistics=bn.Ghost(2), dtype=torch.float64))
    x = random(5, 3, 4)
    expected = [
        F.batch_norm(part.flatten(1), None, None, layer.weight.flatten(), layer.bias.flatten(), training=True)
        for part in (x[:2], x[2:])
    ]
    with bn.kernels.use(kernels):
        assert_close(layer(x), torch.cat(expected).view_as(x))
    assert_close(layer.running_mean, 0.1 * x.mean(0))
    assert_close(layer.running_var, 0.9 + 0.1 * x.var(0))


@each_kernels
def test_renorm_within_its_limits_is_evaluation(kernels):
    layer = randomised(bn.BatchNorm1d((3, 4), statistics=bn.Renorm(1e6, 1e6), dtype=torch.float64))
    x = random(5, 3, 4)
    nn.init.normal_(layer.running_mean)
    nn.init.uniform_(layer.running_var, 0.5, 1.5)
    with bn.kernels.use(kernels):
        expected = copy.deepcopy(layer).eval()(x)
        assert_close(layer(x), expected)
    assert layer.num_batches_tracked == 1


# --- where it goes


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(way):
    layer, x = randomised(bn.BatchNorm2d((3, 2, 4), activation="relu")), torch.randn(5, 3, 2, 4)
    layer(x)
    other = way(layer)
    assert torch.equal(other(x), layer(x))
    assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)
    assert other.running_mean.data_ptr() != layer.running_mean.data_ptr()


def test_saved_and_loaded():
    layer, other = (randomised(bn.BatchNorm1d((3, 4))) for _ in range(2))
    layer(torch.randn(5, 3, 4))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(5, 3, 4)
    assert torch.equal(other.eval()(x), layer.eval()(x))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        bn.BatchNorm1d(3).load_state_dict(layer.state_dict())


def test_reset():
    layer = bn.BatchNorm1d((3, 4))
    layer(torch.randn(5, 3, 4))
    layer.reset_running_stats()
    assert_close([layer.running_mean, layer.running_var], [torch.zeros(3, 4), torch.ones(3, 4)])
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_running_statistics_are_no_narrower_than_float32_for_half_types(dtype):
    layer: Any = bn.BatchNorm1d((3, 4)).to(dtype)
    assert layer.weight.dtype == dtype
    x = (100 + torch.randn(64, 3, 4)).to(dtype)
    for _ in range(100):
        assert layer(x).dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert_close(layer.running_mean.double(), x.double().mean(0), rtol=1e-3, atol=0)


def test_stacked_models_with_vmap_are_each_of_them():
    models: list[Any] = [randomised(bn.BatchNorm1d((2, 3), dtype=torch.float64)) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = random(3, 5, 2, 3)

    def loss(parameters, buffers, x):
        return functional_call(models[0], (parameters, buffers), (x,)).sin().sum()

    found = vmap(grad(loss))(parameters, buffers, x)
    for i, model in enumerate(models):
        expected = torch.autograd.grad(model(x[i]).sin().sum(), list(model.parameters()))
        assert_close([found[name][i] for name, _ in model.named_parameters()], list(expected))
        assert_close(buffers["running_mean"][i], model.running_mean)
        assert_close(buffers["running_var"][i], model.running_var)


@pytest.mark.slow
def test_compiled_as_one_graph_it_equals_eager():
    torch._dynamo.reset()
    layer = randomised(bn.BatchNorm2d((3, 2, 4), activation="relu"))
    compiled: Any = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(5, 3, 2, 4)
        found = []
        for model in (layer, compiled):
            (one,) = asking(x)
            y = model(one)
            found.append([y, *torch.autograd.grad(y.sin().sum(), [one, *model.parameters()])])
        assert_close(*found)
    assert_close(compiled._orig_mod.state_dict(), layer.state_dict())


# --- what is refused


@pytest.mark.parametrize("shape", [(5, 3, 5), (5, 4, 3), (5, 12), (5, 4)])
def test_an_input_of_another_shape(shape):
    layer = bn.BatchNorm1d((3, 4))
    for training in (True, False):
        with pytest.raises(RuntimeError, match=r"expected \(N, 3, 4\).* num_features is \(C, \*S\)"):
            layer.train(training)(torch.randn(shape))
    assert layer.num_batches_tracked == 0


def test_a_residual_or_a_rank_of_another_shape():
    layer, x = bn.BatchNorm2d((3, 4, 2)), torch.randn(5, 3, 4, 2)
    with pytest.raises(ValueError, match="residual"):
        layer(x, torch.randn(5, 3, 4, 3))
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(x.flatten(2))


def test_statistics_move_in_a_model_that_was_made_channels_last():
    # buffers of four dimensions are laid out anew, and what is flattened then is a copy
    layer = bn.BatchNorm3d((3, 2, 4, 5), momentum=1.0).to(memory_format=torch.channels_last)
    x = torch.randn(6, 3, 2, 4, 5)
    layer(x)
    assert_close(layer.running_mean, x.mean(0))
    assert_close(layer.running_var, x.var(0))


def test_a_shape_may_come_as_a_list():
    layer = bn.BatchNorm2d([3, 2, 2])
    assert layer.num_features == (3, 2, 2)
    assert layer(torch.randn(4, 3, 2, 2)).shape == (4, 3, 2, 2)


@pytest.mark.parametrize("shape", [(6, 3, 5, 4), (6, 60), (6, 3, 4, 5, 1)])
def test_a_residual_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="residual has shape"):
        bn.BatchNorm2d((3, 4, 5))(torch.randn(6, 3, 4, 5), torch.randn(shape))
