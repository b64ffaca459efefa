"""Every kernel on odd calls, drawn at random: layouts, dtypes, subsets of arguments, gradient modes.

The oracle is torch's batch norm, sum and activation in float64 on the same values.
"""

import copy
import itertools
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.kernels import choice, dispatch
from tests.mutations.mutation import Mutation

KERNELS = choice.NAMES if choice.built() else ("torch", "reference")


def doubled(module):
    module.register_forward_hook(lambda _, inputs, output: 2 * output)
    return module


# What is given, and what it means.
ACTIVATIONS = [
    (None, lambda z: z),
    ("relu", torch.relu),
    ("leaky_relu", F.leaky_relu),
    ("relu6", F.relu6),
    ("silu", F.silu),
    ("sigmoid", torch.sigmoid),
    (nn.ReLU(inplace=True), torch.relu),
    (nn.ReLU6(), F.relu6),
    (nn.LeakyReLU(0.2), lambda z: F.leaky_relu(z, 0.2)),
    (nn.LeakyReLU(1), lambda z: z),
    (nn.LeakyReLU(0.0), torch.relu),
    (nn.LeakyReLU(-0.2), lambda z: F.leaky_relu(z, -0.2)),
    (doubled(nn.ReLU()), lambda z: 2 * torch.relu(z)),
    (doubled(nn.LeakyReLU(0.2)), lambda z: 2 * F.leaky_relu(z, 0.2)),
    (lambda z: 3 * z, lambda z: 3 * z),
]

# (values, gradients) relative to the largest of a tensor or 1; see tests/grid/test_grid.py.
TOLERANCE = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 2e-5),
    torch.bfloat16: (2**-6, 2**-5),
    torch.float16: (2**-9, 2**-8),
}
# Around a kink an activation's gradient is anybody's: no gradient arrives there.
MARGIN = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 2**-3, torch.float16: 2**-6}
LAYOUTS = ["contiguous", "channels_last", "samples_last", "transposed", "sliced", "expanded", "offset"]


@dataclass(frozen=True)
class Layout:
    kind: str
    dim: int
    step: int

    def of(self, values: Tensor) -> Tensor:
        """`values` in this layout; of those along an expanded dimension, the first."""
        dim = self.dim % values.dim()
        if self.kind == "channels_last":
            return values.movedim(1, -1).contiguous().movedim(-1, 1)
        if self.kind == "samples_last":
            return values.movedim(0, -1).contiguous().movedim(-1, 0)
        if self.kind == "transposed":
            return values.transpose(dim, -1).contiguous().transpose(dim, -1)
        if self.kind == "sliced":
            larger = values.new_full(
                [n * self.step + 1 if d == dim else n for d, n in enumerate(values.shape)], torch.nan
            )
            part = larger[(*[slice(None)] * dim, slice(1, None, self.step))]
            return part.copy_(values)
        if self.kind == "expanded":
            return values.narrow(dim, 0, 1).contiguous().expand(values.shape)
        if self.kind == "offset":
            return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
        return values.contiguous()


layouts = st.builds(Layout, st.sampled_from(LAYOUTS), st.integers(0, 4), st.integers(1, 3))
floats = st.sampled_from(list(TOLERANCE))


@dataclass(frozen=True)
class Case:
    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter_dtype: torch.dtype | None
    weight: bool
    bias: bool
    residual: torch.dtype | None
    activation: int
    training: bool
    running: torch.dtype | None
    wanted: frozenset[str]
    mode: str
    layout: Layout
    layout_of_dy: Layout
    layout_of_residual: Layout


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=5)))
    if len(shape) == 2 and draw(st.booleans()):
        shape = (draw(st.integers(2, 70)), draw(st.integers(1, 40)))  # longer than a vector
    if shape[0] * torch.Size(shape[2:]).numel() == 1:
        shape = (2, *shape[1:])
    dtype, training = draw(floats), draw(st.booleans())
    runnings = [torch.float32, torch.float64]
    return Case(
        seed=draw(st.integers(0, 10_000)),
        shape=shape,
        dtype=dtype,
        parameter_dtype=draw(st.sampled_from([None, torch.float32, torch.float64])),
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        residual=draw(st.sampled_from([None, dtype, dtype, torch.float32, torch.bfloat16])),
        activation=draw(st.integers(0, len(ACTIVATIONS) - 1)),
        training=training,
        running=draw(st.sampled_from([*runnings, None] if training else runnings)),
        wanted=frozenset(draw(st.sets(st.sampled_from(["x", "weight", "bias", "residual"])))),
        mode=draw(st.sampled_from(["grad", "grad", "grad", "no_grad", "inference"])),
        layout=draw(layouts),
        layout_of_dy=draw(layouts),
        layout_of_residual=draw(layouts),
    )


def operands(case):
    """x, weight, bias, residual, running_mean and running_var, those that there are."""
    noise = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    channels, parameter = case.shape[1], case.parameter_dtype or case.dtype
    made = {
        "x": case.layout.of((1 + normal(*case.shape)).to(case.dtype)),
        "weight": (1 + normal(channels) / 2).to(parameter) if case.weight else None,
        "bias": normal(channels).to(parameter) if case.bias else None,
        "residual": case.layout_of_residual.of(normal(*case.shape).to(case.residual))
        if case.residual
        else None,
        "running_mean": normal(channels).to(case.running) if case.running else None,
        "running_var": (normal(channels).square() + 0.5).to(case.running) if case.running else None,
    }
    found = {name: value for name, value in made.items() if value is not None}
    return {name: value.requires_grad_() if name in case.wanted else value for name, value in found.items()}


def oracle(case):
    """(the oracle's outcome, dy)."""
    own = {
        name: value.detach().double().clone().requires_grad_(value.requires_grad)
        for name, value in operands(case).items()
    }
    z = F.batch_norm(
        own["x"], own.get("running_mean"), own.get("running_var"), own.get("weight"), own.get("bias"),
        case.training, 0.3, 1e-3,
    )  # fmt: skip
    z = z + own["residual"] if "residual" in own else z
    y = ACTIVATIONS[case.activation][1](z)
    near = (z.detach().abs() < MARGIN[case.dtype]) | ((z.detach() - 6).abs() < MARGIN[case.dtype])
    dy = torch.randn(case.shape, generator=torch.Generator().manual_seed(case.seed + 1), dtype=torch.float64)
    if case.layout_of_dy.kind == "expanded":
        near = near.any(case.layout_of_dy.dim % near.dim(), keepdim=True)
    dy = case.layout_of_dy.of(dy.to(case.dtype).masked_fill(near, 0))
    if y.requires_grad:
        y.backward(dy.double())
    return outcome(y, own), dy


def outcome(y, given):
    return {
        "y": y.detach(),
        **{f"d{name}": value.grad for name, value in given.items() if value.requires_grad},
        **{name: value for name, value in given.items() if name.startswith("running")},
    }


MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize(
    "kernels",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "native")) for name in KERNELS],
)
@settings(max_examples=400)
@given(case=cases())
def test_agrees_with_float64(kernels, case):
    expected, dy = oracle(case)
    given = operands(case)
    x = given["x"]
    activation = ACTIVATIONS[case.activation][0]
    before = {name: value.detach().clone() for name, value in given.items()}
    with bn.kernels.use(kernels), MODES[case.mode]():
        y = bn.batch_norm(
            x, given.get("running_mean"), given.get("running_var"), given.get("weight"), given.get("bias"),
            case.training, 0.3, 1e-3, activation=activation, residual=given.get("residual"),
        )  # fmt: skip
    assert y.dtype == case.dtype
    assert y.requires_grad == (case.mode == "grad" and any(value.requires_grad for value in given.values()))
    if y.requires_grad:
        wanted = {name: value for name, value in given.items() if value.requires_grad}
        gradients = torch.autograd.grad(y, list(wanted.values()), dy)
        for (name, value), gradient in zip(wanted.items(), gradients, strict=True):
            assert (gradient.dtype, gradient.shape) == (value.dtype, value.shape), name
            close(
                gradient, expected[f"d{name}"], max(TOLERANCE[t][1] for t in (case.dtype, value.dtype)), name
            )
            if name == "x" and kernels == "native":
                assert gradient.stride() == torch.empty_like(x).stride()
    close(y, expected["y"], TOLERANCE[case.dtype][0], "y")
    if kernels == "native" and dispatch._fused(x, activation, given.get("residual")):
        assert y.stride() == torch.empty_like(x).stride()
    for name, value in given.items():
        if name.startswith("running"):
            # the torch kernels know the batch's moments in float32 only
            close(value, expected[name], 1e-6, name)
        else:
            assert torch.equal(value, before[name]), f"{name} was written to"


def close(found, expected, tolerance, name):
    scale = max(1.0, expected.abs().max().item())
    error = (found.detach().double() - expected).abs().max().item() / scale
    assert error <= tolerance, f"{name} is off by {error:.1e}"


# --- what is not quite what a kernel knows


class OwnReLU(nn.ReLU):
    def forward(self, input):
        return input.relu() + 1


@pytest.mark.parametrize("module", [OwnReLU(), nn.LeakyReLU(-0.5)], ids=["a subclass", "a negative slope"])
def test_an_activation_that_is_not_quite_a_known_one_is_called(module):
    tensors = torch.randn(2, 8, 3, dtype=torch.float64).unbind()

    def results(before, after):
        x, residual = (t.clone().requires_grad_() for t in tensors)
        y = after(bn.batch_norm(x, None, None, training=True, activation=before, residual=residual))
        return y, torch.autograd.grad(y.sin().sum(), [x, residual])

    assert_close(results(module, lambda y: y), results(None, module))


@pytest.mark.parametrize("training", [True, False])
def test_parameters_may_lie_apart(training):
    x, (weight, bias) = torch.randn(4, 3).double(), torch.randn(2, 6).double()[:, ::2]

    def results(weight, bias):
        running = torch.tensor([0.5, -1.0, 0.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
        return bn.batch_norm(x, *running, weight, bias, training), *running

    together = results(weight.contiguous(), bias.contiguous())
    assert_close(results(weight, bias), together, rtol=0, atol=0)


def in_memory_order(values, order):
    """The same values, the dimensions in this order in memory."""
    back = [order.index(dim) for dim in range(values.dim())]
    return values.permute(order).contiguous().permute(back)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 1, 2), (3, 2, 2, 1), (1, 2, 1, 3), (3, 2, 1, 1), (2, 3, 1, 2, 1)])
@pytest.mark.parametrize("kernels", KERNELS)
def test_an_image_of_one_row_has_one_gradient_however_it_lies_in_memory(kernels, shape, training):
    """torch's own backward on a CPU takes such a gradient for one of another layout, without an error."""
    x, dy = torch.randn(shape), torch.randn(shape)
    layer = bn.BatchNorm(2 if shape[1] == 2 else 3).train(training)
    layer.get_buffer("running_var").mul_(2)
    expected = gradient(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
    orders = list(itertools.permutations(range(len(shape))))
    for order, other in itertools.product(orders[:: 1 if len(shape) == 4 else 11], repeat=2):
        found = gradient(layer, in_memory_order(x, order), in_memory_order(dy, other), kernels)
        assert_close(found.double(), expected, rtol=1e-4, atol=1e-5, msg=f"x as {order}, gradient as {other}")


def gradient(layer, x, dy, kernels):
    x = x.detach().requires_grad_()
    with bn.kernels.use(kernels):
        return torch.autograd.grad(layer(x), x, dy)[0]


MUTATIONS = [
    Mutation(
        "an activation's hooks passed over", "kernels/dispatch.py",
        "        module._forward_hooks\n        or module", "        module",
        "a fused activation calls none",
    ),
    Mutation(
        "a subclass taken for ReLU", "kernels/dispatch.py",
        "type(module) is nn.ReLU:", "isinstance(module, nn.ReLU):",
        "it may do anything",
    ),
]  # fmt: skip
