"""Tests of the kernels in Triton against float64, on a GPU or interpreted: test_triton_launches runs them."""

import os
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from batchnorm.kernels import native, node, reference, tiling, triton_launches
from batchnorm.kernels.call import NOT_FUSED, Call
from batchnorm.moments import Moments
from tests.grid.implementations import ORACLE, _ByAutograd
from tests.grid.problems import LAYOUTS, PROBLEMS, Problem
from tests.grid.test_grid import tolerance

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# the interpreter computes in NumPy, which warns of what is not finite
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched."""
    kernels, start = [], triton_launches._start

    def noting(kernel, *arguments):
        kernels.append(kernel)
        start(kernel, *arguments)

    monkeypatch.setattr(triton_launches, "_start", noting)
    return kernels


@pytest.fixture
def few_parts(monkeypatch):
    """Parts of many tiles, of which the last has fewer: an interpreter's programs follow each other anyway."""
    monkeypatch.setattr(tiling, "_PROGRAMS", 2)
    monkeypatch.setattr(tiling, "_PROGRAMS_OF_ROWS", 5)
    tiling.tiling.cache_clear()
    yield
    tiling.tiling.cache_clear()


def placed(x):
    """`x` on the device, at the same strides."""
    if x is None or x.device == DEVICE:
        return x
    memory = torch.zeros(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device=DEVICE)
    y = memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x.detach())
    return y.requires_grad_(x.requires_grad)


def step(x, weight=None, bias=None, residual=None, call=None):
    """As a layer in training does it, differentiable."""
    call = call or Call(True, 1e-5)
    call.kernels = triton_launches
    assert triton_launches.supports(x, weight, bias, residual, call)
    return node.Normalise.apply(x, weight, bias, residual, call)


class Triton(_ByAutograd):
    def forward(self, problem, tensors, training):
        t = tensors
        fused = problem.activation in (None, *native.FUSED)
        call = Call(
            training, problem.eps, problem.activation, t.running_mean, t.running_var, problem.momentum
        )
        call.updates_inline = training
        call.fused = native.FUSED.get(problem.activation, NOT_FUSED)
        y = step(t.input, t.weight, t.bias, t.residual if fused else None, call)
        return y if fused else reference.activate(y, problem.activation, t.residual)


MORE = [
    Problem("four positions", (4, 5, 2, 2)),
    Problem("the edge of a tile", (3, 2, 16, 16)),
    Problem("several tiles", (2, 1, 48, 64)),
    Problem("many channels, channels_last", (4, 130, 2, 2), "channels_last"),
    Problem("residual, leaky_relu", (8, 3, 5, 5), residual=True, activation="leaky_relu"),
    Problem("residual, relu6", (8, 3, 5, 5), "channels_last", residual=True, activation="relu6"),
]
GRID = [*(each for each in PROBLEMS if each.name != "many channels" or not INTERPRETED), *MORE]
CASES = [
    (problem, dtype, training)
    for i, problem in enumerate(GRID)
    for j, dtype in enumerate(DTYPES)
    for training in (True, False)
    # an interpreter is slow: every problem in float32, the other dtypes in turn
    if not INTERPRETED or (training and dtype == torch.float32) or (i + j + 2 * training) % 5 == 0
]


@pytest.mark.parametrize(
    ("problem", "dtype", "training"), CASES, ids=lambda v: v.name if isinstance(v, Problem) else str(v)
)
def test_agrees_with_float64(problem, dtype, training):
    tensors = problem.tensors(dtype)
    expected = ORACLE.run(problem, tensors.double(), training)
    tensors = replace(tensors, **{name: placed(value) for name, value in vars(tensors).items()})
    found = Triton().run(problem, tensors, training)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = max(1.0, expected[name].abs().max().item())
        error = (value.double().cpu() - expected[name]).abs().max().item() / scale
        # the interpreter cuts a bfloat16 off where a GPU rounds it
        limit = tolerance(name, dtype) * (2 if INTERPRETED and dtype == torch.bfloat16 else 1)
        assert error <= limit, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_lie_in_memory_as_the_input(layout):
    x = placed(LAYOUTS[layout](torch.randn(4, 3, 5, 4))).requires_grad_()
    y = step(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.stride() == dx.stride() == torch.empty_like(x).stride()


# --- digits


def outlier(shape, place):
    x = torch.randn(shape)
    x.view(-1)[int(place * x.numel())] = 1e4
    return x


def in_last_sample(shape):
    return (torch.arange(shape[0]) == shape[0] - 1).view(-1, *[1] * (len(shape) - 1))


FAMILY = {
    "constant": lambda shape: torch.full(shape, 3.7),
    "two values": lambda shape: torch.where(torch.rand(shape) < 0.3, 0.1, 0.7),
    "rarely 1": lambda shape: (torch.rand(shape) < 0.02).float(),
    "sorted": lambda shape: torch.randn(shape).flatten().sort().values.reshape(shape),
    "a ramp": lambda shape: torch.arange(torch.Size(shape).numel()).float().reshape(shape),
    "an outlier": lambda shape: outlier(shape, 0.5),
    "an outlier first": lambda shape: outlier(shape, 0.0),
    "a mean of 1e4": lambda shape: torch.randn(shape) + 1e4,
    "0 and 1 about 1e4": lambda shape: (torch.rand(shape) < 0.5) + 1e4,
    "a step of 1e4": lambda shape: torch.randn(shape) + 1e4 * in_last_sample(shape),
}


@pytest.mark.parametrize("shape", [(10, 1, 48, 64), (3000, 33)], ids=str)
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.usefixtures("few_parts")
def test_no_digit_is_lost(shape, name):
    x, dy = FAMILY[name](shape), torch.randn(shape)
    outcomes = []
    for kind, dtype in (("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)):
        given = (placed(x) if kind == "triton" else x).to(dtype).clone().requires_grad_()
        y = step(given) if kind == "triton" else F.batch_norm(given, None, None, training=True)
        (dx,) = torch.autograd.grad(y, given, dy.to(given))
        outcomes.append((y.detach().double().cpu(), dx.double().cpu()))
    (expected, dx), (theirs, _), (found, gradient) = outcomes
    scale = max(1, expected.abs().max().item())
    error, their_error = ((each - expected).abs().max().item() for each in (found, theirs))
    print(f"{name} {shape}: {error:.1e}, torch {their_error:.1e}, at a scale of {scale:.1f}")
    assert error <= 3e-7 * scale, f"{error:.1e}, at a scale of {scale:.1f}"
    assert error <= 2 * their_error + 1e-7 * scale, f"{error:.1e}, torch {their_error:.1e}"
    if name != "constant":  # whose gradient is rounding errors over √eps
        assert (gradient - dx).abs().max() <= 5e-7 * dx.abs().max() + 1e-12


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_known_moments_make_the_same_bits(dtype, layout):
    x = placed(LAYOUTS[layout]((torch.randn(7, 3, 5, 5) + 100).to(dtype)))
    weight, bias = (torch.randn(3, device=DEVICE) for _ in range(2))
    found, again, known = Call(True, 1e-5), Call(False, 1e-5), Call(False, 1e-5)
    found.fused = again.fused = known.fused = native.FUSED["relu"]
    y = triton_launches.forward(x, weight, bias, None, found)
    assert found.stats is not None
    again.stats = found.stats
    known.statistics = found.stats[0], found.stats[1] / found.count
    assert torch.equal(triton_launches.forward(x, weight, bias, None, again), y)
    assert torch.equal(triton_launches.forward(x, weight, bias, None, known), y)


# --- running statistics


def tracked(x, rate=0.25, dtype=torch.float32, batches=3):
    mean = torch.arange(3.0, dtype=dtype, device=DEVICE)
    var = torch.full((3,), 2.0, dtype=dtype, device=DEVICE)
    count = None if batches is None else torch.tensor(batches, device=DEVICE)
    call = Call(True, 1e-5, None, mean, var, rate, count)
    call.updates_inline = True
    triton_launches.forward(x, None, None, None, call)
    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [0.25, 1.0, 0.75, torch.tensor(0.3, dtype=torch.float64)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_running_statistics_follow(layout, rate, dtype):
    x = placed(LAYOUTS[layout](torch.randn(4, 3, 5)))
    given = rate.to(DEVICE) if isinstance(rate, torch.Tensor) else rate
    call = tracked(x, given, dtype, None if rate == 1 else 3)
    mean, var = torch.arange(3.0, dtype=dtype), torch.full((3,), 2.0, dtype=dtype)
    reference.track(Moments.of(x.cpu()), mean, var, float(rate))
    assert call.updated.dtype == torch.bool and call.updated.dim() == 0 and bool(call.updated)
    digits = 1e-7 if dtype == torch.float64 else 1e-6
    assert_close(call.running_mean.cpu(), mean, rtol=digits, atol=digits)
    assert_close(call.running_var.cpu(), var, rtol=digits, atol=digits)
    assert call.batches is None or int(call.batches) == 4
    assert call.running_mean._version > 0  # autograd knows


@pytest.mark.parametrize("channel", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e25])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_batch_that_is_not_finite_does_not_enter(layout, value, channel):
    x = LAYOUTS[layout](torch.randn(4, 3, 5))
    x[1, channel, 2] = value
    call = tracked(placed(x))
    assert bool(call.updated) is False
    assert call.running_mean.tolist() == [0, 1, 2] and call.running_var.tolist() == [2, 2, 2]
    assert int(call.batches) == 3


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_batches_are_counted_that_enter_and_that_do_not(value):
    x = torch.randn(4, 3, 5)
    x[1, 2, 2] = value
    mean, var = (torch.ones(3, device=DEVICE) for _ in range(2))
    call = Call(True, 1e-5, None, mean, var, 0.1)
    call.batches, call.skipped = (torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2))
    call.updates_inline = True
    triton_launches.forward(placed(x), None, None, None, call)
    assert call.updated is True
    assert (int(call.batches), int(call.skipped)) == ((1, 0) if value == 0 else (0, 1))


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "relu6"])
@pytest.mark.parametrize("training", [True, False])
def test_a_nan_comes_through_as_torch_s_does(activation, training):
    tensors = Problem("", (4, 3, 5), activation=activation).tensors(torch.float32)
    with torch.no_grad():
        tensors.input[1, 1, 2] = tensors.input[0, 0, 0] = torch.nan
        tensors.output_gradient[2, 2, 1] = torch.nan
    problem = Problem("", (4, 3, 5), activation=activation)
    theirs = ORACLE.run(problem, tensors.double(), training)
    tensors = replace(tensors, **{name: placed(value) for name, value in vars(tensors).items()})
    found = Triton().run(problem, tensors, training)
    names = ("output", "gradient of input", "gradient of weight", "gradient of bias")
    for name in (
        names[:1] if activation == "relu6" else names
    ):  # of which torch's gradient is 0 or dy, by device
        ours = found[name].double().cpu()
        assert_close(ours, theirs[name], equal_nan=True, rtol=1e-4, atol=1e-5)


# --- launches


@pytest.mark.parametrize(("training", "forwards", "backwards"), [(True, 3, 3), (False, 1, 2)])
@pytest.mark.parametrize("residual", [False, True])
def test_three_launches_each_way(launched, residual, training, forwards, backwards):
    problem = Problem("", (4, 3, 5, 4), activation="relu", residual=residual)
    tensors = problem.tensors(torch.float32)
    tensors = replace(tensors, **{name: placed(value) for name, value in vars(tensors).items()})
    y = Triton().forward(problem, tensors, training)
    assert len(launched) == forwards
    y.backward(tensors.output_gradient)
    assert len(launched) == forwards + backwards


# --- groups, and moments of other values


def near(found, expected):
    assert_close(found, expected, rtol=1e-5, atol=1e-5, check_device=False, check_dtype=False)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("samples", "group"), [(7, 2), (6, 3), (3, 5), (4, 4)])
def test_groups(samples, group, layout):
    x, dy = LAYOUTS[layout](torch.randn(samples, 3, 4, 5) * 2 + 5), torch.randn(samples, 3, 4, 5)
    weight, bias = torch.randn(3), torch.randn(3)
    inputs = [value.double().requires_grad_() for value in (x, weight, bias)]
    expected, moments = reference.batch_norm(inputs[0], inputs[1], inputs[2], Call(True, 1e-5, group=group))
    gradients = torch.autograd.grad(F.relu(expected), inputs, dy.double())
    call = Call(True, 1e-5, group=group)
    call.fused = native.FUSED["relu"]
    x, dy, weight, bias = map(placed, (x, dy, weight, bias))
    y = triton_launches.forward(x, weight, bias, None, call)
    assert_close(y.double().cpu(), F.relu(expected).detach(), rtol=0, atol=2e-6)
    assert moments is not None and call.stats is not None
    assert_close(call.count, moments.count, check_device=False)
    assert_close(call.stats[0].cpu(), moments.mean.detach(), rtol=1e-6, atol=1e-6)
    assert_close(call.stats[1].cpu(), moments.m2.detach(), rtol=1e-6, atol=1e-6)
    found = triton_launches.backward(dy, x, None, weight, bias, call)
    for value, wanted in zip(found[:3], gradients, strict=True):
        near(value, wanted)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("group", [0, 2])
def test_moments_of_other_values(group, layout):
    """Sums, and gradients by averages, as a batch that is shared with other ranks needs them."""
    x, dy = LAYOUTS[layout](torch.randn(4, 3, 5)), torch.randn(4, 3, 5)
    residual, weight = torch.randn(4, 3, 5), torch.randn(3)
    shape = (2, 3) if group else (3,)
    call = Call(True, 1e-5, group=group)
    call.fused = native.FUSED["relu6"]
    call.statistics = torch.randn(shape).double(), torch.rand(shape).double() + 0.5
    averages = torch.randn(2, *shape).double()
    y = native.forward(x, weight, None, residual, call)
    sums = native.sums(dy, x, y, weight, None, call)
    dx, _, _, dresidual = native.backward(dy, x, y, weight, None, call, call.statistics, averages)
    mean, _ = native.moments(x, group)
    call.statistics = tuple(map(placed, call.statistics))
    x, dy, weight, averages, residual = map(placed, (x, dy, weight, averages, residual))
    near(triton_launches.forward(x, weight, None, residual, call), y)
    y = placed(y)
    near(triton_launches.sums(dy, x, y, weight, None, call), sums)
    found = triton_launches.backward(dy, x, y, weight, None, call, call.statistics, averages)
    near(found[0], dx)
    near(found[3], dresidual)
    near(triton_launches.moments(x, group)[0], mean)


# --- other arguments


def test_parameters_of_another_dtype():
    x = placed(torch.randn(6, 3, 5).bfloat16()).requires_grad_()
    weight = torch.randn(3, device=DEVICE, requires_grad=True)
    y = step(x, weight)
    dx, dweight = torch.autograd.grad(y, [x, weight], torch.ones_like(y))
    assert dx.dtype == y.dtype == torch.bfloat16 and dweight.dtype == torch.float32


def test_gradients_that_are_no_values_side_by_side():
    x, dy = placed(torch.randn(6, 3, 5)).requires_grad_(), placed(torch.randn(6, 3, 5))
    (plain,) = torch.autograd.grad(step(x), x, -dy)
    (negated,) = torch.autograd.grad(step(x), x, torch._neg_view(dy))
    assert torch.equal(plain, negated)
    one = dy[:, :1, :1].expand(6, 3, 5)
    (expanded,) = torch.autograd.grad(step(x), x, one)
    (dense,) = torch.autograd.grad(step(x), x, one.contiguous())
    assert torch.equal(expanded, dense)


def test_what_is_left_to_other_kernels():
    x, weight = torch.randn(4, 3, 5, device=DEVICE), torch.randn(3, device=DEVICE)
    call = Call(True, 1e-5)
    assert triton_launches.supports(x, weight, None, x, call)
    for given, scale, added in (
        (x[:0], None, None),
        (x.to(torch.float8_e5m2), None, None),
        (x.to("meta"), None, None),
        (x, weight.to("meta"), None),
        (x, weight.int(), None),
        (x, None, x[:1]),
    ):
        assert not triton_launches.supports(given, scale, None, added, call)
