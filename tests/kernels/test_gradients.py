"""Gradients of every kind through the native kernels, and what torch promises about graphs."""

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.kernels import choice
from tests.kernels.observer import Observer

pytestmark = pytest.mark.skipif(not choice.built(), reason="installed without native kernels")


@pytest.fixture(autouse=True)
def _native():
    with choice.use("native"):
        yield


NAMES = ["x", "weight", "bias", "residual"]


def operands(dtype=torch.float64, shape=(3, 2, 4)):
    x, residual = torch.randn(2, *shape, dtype=dtype).unbind()
    weight, bias = (torch.rand(2, shape[1], dtype=dtype) + 0.5).unbind()
    return [t.clone().requires_grad_() for t in (x, weight, bias, residual)]


def call(x: Any, *given: Any, training: bool = True, activation: Any = None) -> Any:
    """Of x and as many as are given of weight, bias and residual."""
    weight, bias, residual = [*given, None, None, None][:3]
    running = torch.tensor([0.3, -0.2], dtype=x.dtype), torch.tensor([0.7, 1.4], dtype=x.dtype)
    return bn.batch_norm(
        x, *running, weight, bias, training, 0.1, 1e-2, activation=activation, residual=residual
    )


each_call = pytest.mark.parametrize(
    ("training", "activation", "residual"),
    list(itertools.product([True, False], [None, "leaky_relu", "relu6", "sigmoid"], [True, False])),
)


@each_call
def test_gradients_of_the_first_and_the_second_order(training, activation, residual):
    given = operands()[: 4 if residual else 3]

    def function(*given):
        return call(*given, training=training, activation=activation)

    assert gradcheck(function, given)
    assert gradgradcheck(function, given)


@pytest.mark.parametrize("training", [True, False])
def test_watched_it_has_gradients_of_the_second_order(training):
    with Observer():
        assert gradgradcheck(lambda *given: call(*given, training=training), operands()[:3])


@each_call
def test_hessian_vector_products_are_the_reference_s(training, activation, residual):
    given = operands()[: 4 if residual else 3]
    direction = [torch.randn_like(t) for t in given]
    found = []
    for kernels in ("native", "reference"):
        with bn.kernels.use(kernels):
            y = call(*given, training=training, activation=activation)
            gradients = torch.autograd.grad(y.sin().sum(), given, create_graph=True)
            product = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
            found.append([*gradients, *torch.autograd.grad(product, given)])
    assert_close(*found)


SUBSETS = [names for n in range(1, 5) for names in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", nn.LeakyReLU(-0.2)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_any_subset_of_arguments_has_its_gradients(wanted, training, activation, create_graph):
    given = operands()
    asked = [t for name, t in zip(NAMES, given, strict=True) if name in wanted]
    for t in given:
        t.requires_grad_(any(t is other for other in asked))
    found = []
    for kernels in ("native", "reference"):
        with bn.kernels.use(kernels):
            y = call(*given, training=training, activation=activation)
            found.append(torch.autograd.grad(y.sin().sum(), asked, create_graph=create_graph))
    assert_close(*found)


# --- many gradients at once


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_gradients_is_each_of_them(training, residual, create_graph):
    given = operands()[: 4 if residual else 3]
    y = call(*given, training=training, activation="leaky_relu")
    dy = torch.randn(5, *y.shape, dtype=y.dtype)

    def gradients(dy, **options):
        return torch.autograd.grad(y, given, dy, retain_graph=True, create_graph=create_graph, **options)

    each = [torch.stack(values) for values in zip(*map(gradients, dy), strict=True)]
    assert_close(list(gradients(dy, is_grads_batched=True)), each)


def test_a_vectorised_jacobian_is_torch_s():
    x = torch.randn(3, 2, dtype=torch.float64)
    found = [
        torch.autograd.functional.jacobian(lambda x, f=f: f(x, None, None, training=True), x, vectorize=True)
        for f in (bn.batch_norm, nn.functional.batch_norm)
    ]
    assert_close(*found)


# --- torch.func


def per_call(*given, training=True, activation="leaky_relu"):
    return call(*given, training=training, activation=activation).sin().sum()


@pytest.mark.parametrize("training", [True, False])
def test_func_grad(training):
    given = operands()
    expected = torch.autograd.grad(per_call(*given, training=training), given)
    found = grad(lambda *given: per_call(*given, training=training), argnums=(0, 1, 2, 3))(
        *(t.detach() for t in given)
    )
    assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own use of it
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_agrees_with_the_backward_pass(training):
    given = [t.detach() for t in operands()]
    tangents = [torch.randn_like(t) for t in given]

    def function(*given):
        return per_call(*given, training=training)

    asked = [t.clone().requires_grad_() for t in given]
    gradients = torch.autograd.grad(function(*asked), asked)
    expected = sum((g * v).sum() for g, v in zip(gradients, tangents, strict=True))
    assert_close(jvp(function, tuple(given), tuple(tangents))[1], expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, v) for t, v in zip(given, tangents, strict=True)]
        assert_close(forward_ad.unpack_dual(function(*duals)).tangent, expected)


def test_models_stacked_with_vmap_are_each_of_them():
    models: list[Any] = [
        nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3, activation="relu"), nn.Linear(3, 2)).eval()
        for _ in range(3)
    ]
    for model in models:
        model[1].running_mean.normal_()
    parameters, buffers = stack_module_state(models)

    def loss(parameters, buffers, x):
        return functional_call(models[0], (parameters, buffers), (x,)).sin().sum()

    x = torch.randn(6, 4)
    found = vmap(grad(loss), in_dims=(0, 0, None))(parameters, buffers, x)
    for i, model in enumerate(models):
        expected = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
        assert_close([found[name][i] for name, _ in model.named_parameters()], list(expected))


# --- autocast


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast(kind, activation):
    before = nn.Linear(6, 3, bias=False) if kind == "linear" else nn.Conv1d(6, 3, 1, bias=False)
    norm = bn.BatchNorm1d(3, activation=activation)
    x = torch.randn(20, 6) if kind == "linear" else torch.randn(20, 6, 4)
    outcomes = []
    for kernels in ("native", "reference"):
        with bn.kernels.use(kernels), torch.autocast("cpu", torch.bfloat16):
            y = norm(before(x))
            assert y.dtype == torch.bfloat16
            loss = y.float().square().sum()
        outcomes.append([y, *torch.autograd.grad(loss, [*before.parameters(), *norm.parameters()])])
    for a, b in zip(*outcomes, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= 2**-5 * max(1, b.abs().max())
    assert outcomes[0][1].dtype == torch.float32


# --- what torch promises about graphs


@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("training", [True, False])
def test_what_was_modified_in_place_before_the_backward_pass_is_an_error(name, training):
    given = operands()
    y = call(*given, training=training, activation="relu")
    with torch.no_grad():
        given[NAMES.index(name)].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_modified_in_place_is_an_error_where_the_backward_pass_reads_it():
    y = call(*operands(), activation="relu")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_an_output_may_be_modified_in_place_where_it_does_not(training):
    given = operands()[:3]
    y = call(*given, training=training, activation="relu")
    expected = torch.autograd.grad((3 * y).sin().sum(), given, retain_graph=True)
    y.mul_(3)
    assert_close(torch.autograd.grad(y.sin().sum(), given), expected)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_a_running_statistic_moved_after_a_graph_saved_it_is_an_error(name):
    layer, factor = bn.BatchNorm1d(2), torch.ones(2, requires_grad=True)
    penalty = (factor * layer.get_buffer(name)).sum()
    layer(torch.randn(3, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_a_batch_that_does_not_enter_leaves_such_a_graph_alone():
    layer, factor = bn.BatchNorm1d(2), torch.ones(2, requires_grad=True)
    penalty = (factor * layer.get_buffer("running_mean")).sum()
    with pytest.warns(RuntimeWarning, match="inf or nan"):
        layer(torch.full((3, 2), torch.nan))
    penalty.backward()


@pytest.mark.parametrize(
    "way", [nullcontext, lambda: bn.kernels.use("torch"), Observer], ids=["native", "torch's", "watched"]
)
def test_a_later_batch_leaves_the_gradient_of_an_evaluation_alone(way):
    layer, x = bn.BatchNorm1d(2).eval(), torch.randn(3, 2, requires_grad=True)
    with way():
        expected = torch.autograd.grad(layer(x).sin().sum(), [x, layer.weight])
        loss = layer(x).sin().sum()
        layer.train()(torch.randn(3, 2) + 5)
        assert_close(torch.autograd.grad(loss, [x, layer.weight]), expected)


def test_a_retained_graph_gives_the_same_twice_and_one_that_is_not_an_error():
    given = operands()
    loss = per_call(*given)
    first = torch.autograd.grad(loss, given, retain_graph=True)
    assert_close(torch.autograd.grad(loss, given), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, given)


def test_hooks_see_the_gradients_and_may_change_them():
    given = operands()
    y = call(*given, activation="relu")
    expected = torch.autograd.grad(2 * y.sum(), given, retain_graph=True)
    y.register_hook(lambda dy: 2 * dy)
    seen = {}

    def negate(t):
        t.grad.neg_()

    for name, t in zip(NAMES, given, strict=True):
        t.register_hook(lambda value, name=name: seen.update({name: value.clone()}))
        t.register_post_accumulate_grad_hook(negate)
    y.sum().backward()
    assert_close([seen[name] for name in NAMES], list(expected))
    assert_close([t.grad.neg() for t in given if t.grad is not None], list(expected))


def test_saved_tensors_may_be_packed():
    given = operands()
    packed: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> int:
        packed.append(t)
        return len(packed) - 1

    expected = torch.autograd.grad(per_call(*given), given)
    with torch.autograd.graph.saved_tensors_hooks(pack, packed.__getitem__):
        loss = call(*given, activation="leaky_relu")
    assert len(packed) == 5  # x, weight, bias, residual, y
    assert_close(torch.autograd.grad(loss.sin().sum(), given), expected)


def test_a_frozen_layer_still_learns_its_weights():
    layer = bn.BatchNorm1d(2, activation="relu").eval()
    nn.init.normal_(layer.get_buffer("running_mean"))
    before = {name: value.clone() for name, value in layer.named_buffers()}
    x = torch.randn(6, 2)
    loss = layer(x).sin().sum()
    found = torch.autograd.grad(loss, list(layer.parameters()))
    with bn.kernels.use("reference"):
        assert_close(found, torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters())))
    assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)
    assert all(value.abs().sum() > 0 for value in found)
