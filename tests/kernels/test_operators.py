"""The native kernels as torch's compiler, tracers and dispatch modes see them: two operators."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import batchnorm as bn
from tests.kernels.observer import Observer

pytest.importorskip("batchnorm.kernels.operators", reason="installed without native kernels")

FORWARD, BACKWARD = torch.ops.batchnorm.forward.default, torch.ops.batchnorm.backward.default


@pytest.fixture(autouse=True)
def _alone():
    torch._dynamo.reset()  # what one test compiled counts against the next one's limit of recompilations
    with bn.kernels.use("native"):
        yield


def called(graph):
    return [node.target for node in graph.nodes if node.target in (FORWARD, BACKWARD)]


# --- torch's own checks of an operator


def operands(dtype=torch.float32, parameters=None, channels_last=False, shape=(4, 3, 2, 5)):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, residual, dy = torch.randn(3, *shape, dtype=dtype).unbind()
    weight, bias, mean, variance = (torch.rand(4, shape[1], dtype=parameters or dtype) + 0.5).unbind()
    x, residual = (t.contiguous(memory_format=layout) for t in (x, residual))
    return x, weight, bias, residual, dy, mean, variance


OPERANDS = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16, "parameters": torch.float32},
    "channels_last": {"channels_last": True},
}
# torch's own check reads .grad of its copies.
checks = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
each_operands = pytest.mark.parametrize("options", OPERANDS.values(), ids=OPERANDS)


def differentiable(*tensors):
    return [t if t is None else t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.slow
@checks
@each_operands
def test_forward_in_training_with_a_residual_and_relu(options):
    x, weight, bias, residual, *_ = operands(**options)
    opcheck(FORWARD, (*differentiable(x, weight, bias, residual), None, None, 1e-3, 1, 0.0))


@pytest.mark.slow
@checks
@pytest.mark.parametrize(
    ("affine", "with_residual", "activation", "slope"),
    [(False, False, 0, 0.0), (False, True, 0, 0.0), (True, True, 2, 0.2), (True, False, 3, 0.0)],
)
def test_forward_in_evaluation(affine, with_residual, activation, slope):
    x, weight, bias, residual, _, mean, variance = operands()
    x, weight, bias, residual = differentiable(
        x, *((weight, bias) if affine else (None, None)), residual if with_residual else None
    )
    opcheck(FORWARD, (x, weight, bias, residual, mean, variance, 1e-3, activation, slope))


@pytest.mark.slow
@checks
@each_operands
@pytest.mark.parametrize("given", [False, True])
def test_backward(options, given):
    x, weight, bias, residual, dy, mean, variance = operands(**options)
    stats = (mean, variance) if given else (None, None)
    y, stats = FORWARD(x, weight, bias, residual, *stats, 1e-3, 1, 0.0)
    opcheck(BACKWARD, (dy, x, y, weight, bias, stats, given, 1e-3, 1, 0.0))
    opcheck(BACKWARD, (dy, x, None, None, None, stats, given, 1e-3, 2, 0.2))


# --- compiled


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}]
)
@pytest.mark.parametrize("activation", ["relu", "silu", nn.LeakyReLU(0.2)], ids=str)
def test_compiled_as_one_graph_it_equals_eager(training, options, activation):
    ours = bn.BatchNorm2d(3, activation=activation, **options).train(training)
    for value in (*ours.parameters(), *ours.buffers()):
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5)
    layers = [ours, copy.deepcopy(ours)]
    compiled = torch.compile(layers[1], backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x, residual = torch.randn(2, 4, 3, 2, 5).unbind()
        outcomes = []
        for call in (ours, compiled):
            given = differentiable(x, residual)
            y = call(*given)
            y.sin().sum().backward()
            outcomes.append([y, *(t.grad for t in given)])
        assert_close(*outcomes)
    assert_close(*([p.grad for p in layer.parameters()] for layer in layers))
    assert_close(*(layer.state_dict() for layer in layers))
    if training and "track_running_stats" not in options:
        assert layers[1].num_batches_tracked == 2


@pytest.mark.slow
def test_a_batch_of_another_size_does_not_compile_again_and_again():
    counter = CompileCounterWithBackend("aot_eager")
    layer = bn.BatchNorm2d(3, activation="relu")
    compiled = torch.compile(copy.deepcopy(layer), backend=counter, fullgraph=True)
    for samples in (4, 7, 3, 9, 5):
        x, residual = torch.randn(2, samples, 3, 2, 5).unbind()
        assert_close(compiled(x, residual), layer(x, residual))
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_the_compiler_s_graphs_hold_one_operator_each_way():
    graphs = []

    def seen(module, _):
        graphs.append(called(module.graph))
        return make_boxed_func(module)

    layer = bn.BatchNorm2d(3, activation="relu")
    x, residual = (t.requires_grad_() for t in torch.randn(2, 4, 3, 2, 5).unbind())
    torch.compile(layer, backend=aot_autograd(fw_compiler=seen, bw_compiler=seen), fullgraph=True)(
        x, residual
    ).sum().backward()
    assert graphs == [[FORWARD], [BACKWARD]]


# --- observed


def test_a_dispatch_mode_sees_the_operators():
    layer, x = bn.BatchNorm1d(3, activation="relu"), torch.randn(5, 3, requires_grad=True)
    with Observer() as seen:
        layer(x).sum().backward()
    assert [operator for operator in seen.operators if operator in (FORWARD, BACKWARD)] == [FORWARD, BACKWARD]


def test_a_dispatch_mode_around_the_backward_pass_alone_sees_it():
    x = torch.randn(5, 3, requires_grad=True)
    y = bn.BatchNorm1d(3)(x)
    with Observer() as seen:
        y.sin().sum().backward()
    assert BACKWARD in seen.operators


def test_traced_with_its_gradient_it_gives_the_same():
    layer = bn.BatchNorm2d(3, activation="relu", track_running_stats=False)

    def gradients(x, residual):
        y = layer(x, residual)
        return y, *torch.autograd.grad(y.sin().sum(), (x, residual, *layer.parameters()))

    given = [t.requires_grad_() for t in torch.randn(2, 4, 3, 2, 5).unbind()]
    traced = make_fx(gradients)(*given)
    assert called(traced.graph) == [FORWARD, BACKWARD]
    given = [t.requires_grad_() for t in torch.randn(2, 4, 3, 2, 5).unbind()]
    assert_close(traced(*given), gradients(*given))


def test_a_backward_pass_traced_by_itself_gives_the_same():
    x = torch.randn(4, 3, requires_grad=True)
    y = bn.batch_norm(x, None, None, training=True, activation="relu")

    def gradient(dy):
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    traced = make_fx(gradient)(torch.randn(4, 3))
    dy = torch.randn(4, 3)
    assert_close(traced(dy), gradient(dy))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traced_by_torch_jit_it_gives_the_same(grad):
    # also what torch.onnx.export(dynamo=False) and TorchScript deployments do
    layer = bn.BatchNorm2d(3, activation="relu").eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, torch.randn(4, 3, 2, 5))
        x = torch.randn(4, 3, 2, 5)
        assert_close(traced(x), layer(x))


@each_operands
@pytest.mark.parametrize("training", [True, False])
def test_fake_tensors_are_laid_out_as_real_ones(options, training):
    layer = bn.BatchNorm2d(3, activation="relu").train(training)
    x, _, _, residual, *_ = operands(**options)

    def outcome(layer, *given):
        asked = [t.requires_grad_() for t in given]
        y = layer(*asked)
        return [y, *torch.autograd.grad(y.sum(), (*asked, *layer.parameters()))]

    real = outcome(layer, x, residual)
    with FakeTensorMode() as mode:
        fake = outcome(
            bn.BatchNorm2d(3, activation="relu").train(training), *map(mode.from_tensor, (x, residual))
        )
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_a_flop_counter_counts_a_model_with_the_layer():
    totals = []
    for last in (bn.BatchNorm2d(4), nn.Identity()):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), last)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 5, 5)).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize("place", ["input", "weight"])
def test_a_plain_subclass_of_tensor_keeps_its_values(place):
    class Named(torch.Tensor):
        pass

    x, weight = torch.randn(5, 3), torch.rand(3)
    expected = bn.batch_norm(x, None, None, weight, training=True)
    if place == "input":
        x = x.as_subclass(Named)
    else:
        weight = weight.as_subclass(Named)
    assert_close(bn.batch_norm(x, None, None, weight, training=True).as_subclass(torch.Tensor), expected)
