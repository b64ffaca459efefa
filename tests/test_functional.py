"""`batch_norm`: torch's errors, and gradients of every order and by every transform, with torch as the oracle."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import batch_norm as torch_batch_norm
from torch.testing import assert_close

from batchnorm import BatchNorm1d, batch_norm
from batchnorm.kernels.reference import activation_function

# torch scripts its own forward-mode formulas when they are first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

SMOOTH = ["silu", "sigmoid", "tanh"]
KINKED = ["relu", "leaky_relu", "relu6"]
NAMES = [*SMOOTH, *KINKED]


def float64(*shape):
    return torch.randn(shape, dtype=torch.float64)


def running():
    return torch.tensor([0.5, -1.0, 0.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()


# --- errors: a call that torch refuses is refused with the same type, and with advice

X = torch.randn(4, 3)
STATISTICS = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
NONE = {"running_mean": None, "running_var": None}
MODES = [True, False]

REFUSED = [
    # (what is wrong, arguments, the modes in which it is, what the message says)
    ("a vector", STATISTICS | {"input": torch.randn(3)}, MODES, r"shape \(3,\).*unsqueeze"),
    ("a vector, no statistics", NONE | {"input": torch.randn(3)}, MODES, r"shape \(3,\).*unsqueeze"),
    ("integers", STATISTICS | {"input": torch.ones(4, 3, dtype=torch.long)}, MODES, r"int64.*input\.float\(\)"),
    ("bools", STATISTICS | {"input": torch.ones(4, 3, dtype=torch.bool)}, MODES, r"bool.*input\.float\(\)"),
    ("complex", STATISTICS | {"input": torch.ones(4, 3, dtype=torch.complex64)}, MODES, "complex64"),
    *(
        (f"{dtype}", STATISTICS | {"input": torch.ones(4, 3).to(dtype)}, MODES, rf"{dtype}.*input\.float\(\)")
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    ),
    *(
        (f"{name} too long", STATISTICS | {"input": X, name: torch.ones(4)}, MODES,
         rf"{name} should contain 3 elements not 4.*\(4, 3\).*num_features")
        for name in ("running_mean", "running_var", "weight", "bias")
    ),
    *(
        (f"{name} of shape (1, 3)", STATISTICS | {"input": X, name: torch.ones(1, 3)}, MODES, r"\(1, 3\)")
        for name in ("running_mean", "running_var")
    ),
    ("no statistics", NONE | {"input": X}, [False], "training=True"),
    ("only a mean", NONE | {"input": X, "running_mean": torch.zeros(3)}, MODES, "running_var"),
    ("only a variance", NONE | {"input": X, "running_var": torch.ones(3)}, MODES, "running_mean"),
    ("one value", STATISTICS | {"input": X[:1]}, [True], r"\[1, 3\].*larger batch.*\.eval\(\)"),
    ("one value, 4-D", STATISTICS | {"input": torch.randn(1, 3, 1, 1)}, [True], "drop_last"),
    ("eps 0", STATISTICS | {"input": X, "eps": 0.0}, [True], "positive.*0.0"),
    ("eps below 0", STATISTICS | {"input": X, "eps": -1e-5}, MODES, "-1e-05"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "training", "says"),
    [
        pytest.param(arguments, training, says, id=f"{wrong}, {'training' if training else 'evaluation'}")
        for wrong, arguments, modes, says in REFUSED
        for training in modes
    ],
)
def test_refuses_what_torch_refuses(arguments, training, says):
    with pytest.raises(Exception) as torch_s:  # noqa: PT011  # the oracle: any type it likes
        torch_batch_norm(**arguments, training=training)
    with pytest.raises(torch_s.type, match=says):
        batch_norm(**arguments, training=training)


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_refuses_a_weight_that_would_be_broadcast(name, training):
    # torch takes it, and fails in the backward pass; here (1, 3, 1, 1) would give an output of another rank.
    with pytest.raises(
        RuntimeError, match=rf"{name} should contain 3 elements not a shape of \(1, 3, 1, 1\)"
    ):
        batch_norm(**(STATISTICS | {"input": X, name: torch.ones(1, 3, 1, 1)}), training=training)


@pytest.mark.parametrize(
    "wrong",
    [{"weight": torch.ones(4)}, {"residual": torch.ones(4, 1)}, {"activation": "gelu"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_refused_call_leaves_the_statistics_alone(wrong):
    mean, var = running()
    with pytest.raises((RuntimeError, ValueError)):
        batch_norm(float64(4, 3), mean, var, training=True, **wrong)
    assert_close((mean, var), running(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 1), (3,), (1, 3), (4, 3, 1)])
def test_a_residual_is_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"residual has shape .* \(4, 3\).*project or pad"):
        batch_norm(X, None, None, training=True, residual=torch.randn(shape))


def test_an_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'gelu': use \"relu\".*a module"):
        batch_norm(X, None, None, training=True, activation="gelu")


# --- values


@pytest.mark.parametrize("name", NAMES)
def test_an_activation_is_what_torch_calls_so(name):
    x, found = 4 * float64(50), activation_function(name)
    assert found is not None
    assert_close(found(x), getattr(torch.nn.functional, name)(x), rtol=0, atol=0)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(inplace=True), torch.exp])
def test_an_activation_may_be_a_module_or_a_function(activation):
    x = float64(4, 3).requires_grad_()
    expected = activation(torch_batch_norm(x, None, None, training=True))
    found = batch_norm(x, None, None, training=True, activation=activation)
    assert_close(found, expected)
    assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (found, expected)))


def test_eps_may_be_zero_with_running_statistics():
    x, (mean, var) = float64(4, 3), running()
    assert_close(batch_norm(x, mean, var, eps=0.0), (x - mean) / var.sqrt())


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (2, 3, 0), (4, 0), (2, 0, 3, 3)])
def test_an_empty_batch_is_an_empty_output(shape, training):
    channels = shape[1]
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in (shape, (channels,), (channels,)))
    mean, var = torch.full((channels,), 2.0), torch.full((channels,), 3.0)
    y = batch_norm(x, mean, var, weight, bias, training)
    assert y.shape == shape
    gradients = torch.autograd.grad(y.sum(), [x, weight, bias])
    assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]
    assert not any(g.any() for g in gradients)  # a sum over nothing
    assert (mean == 2).all()
    assert (var == 3).all()


@pytest.mark.parametrize("training", MODES)
def test_an_expanded_input(training):
    x = float64(1, 3, 1, 5).expand(4, 3, 2, 5)  # strides of 0
    mean, var = (None, None) if training else running()
    expected = torch_batch_norm(x.contiguous(), mean, var, training=training)
    assert_close(batch_norm(x, mean, var, training=training), expected)


def test_mixed_dtypes_are_taken():
    # torch refuses; a float32 layer in a bfloat16 network is the usual way to keep its parameters precise.
    x, (mean, var) = torch.randn(4, 3), running()
    weight = float64(3)
    y = batch_norm(x.bfloat16(), mean, var, weight, training=True)
    assert y.dtype == torch.bfloat16
    expected = torch_batch_norm(x.bfloat16().double(), None, None, weight, training=True)
    assert_close(y.double(), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("dtype", "of_residual"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float64)],
    ids=str,
)
def test_the_output_keeps_the_input_s_dtype_beside_a_wider_residual(dtype, of_residual, activation, training):
    x, residual = torch.randn(4, 3).to(dtype), torch.randn(4, 3).to(of_residual).requires_grad_()
    mean, var = running()
    y = batch_norm(x, mean, var, training=training, activation=activation, residual=residual)
    assert y.dtype == dtype
    mean, var = running()
    expected = batch_norm(x.double(), mean, var, training=training) + residual.double()
    near = 4 * torch.finfo(dtype).eps
    assert_close(y.double(), expected if activation is None else expected.relu(), rtol=near, atol=near)
    y.sum().backward()
    assert residual.grad is not None and residual.grad.dtype == of_residual


# --- gradients


def affine_cases():
    return pytest.mark.parametrize("given", [(), ("weight",), ("bias",), ("weight", "bias")], ids="+".join)


def problem(given, training, **options):
    """A function of (input, *given), and arguments for it."""

    def function(x, *parameters):
        mean, var = (None, None) if training else running()
        named = dict(zip((*given, "residual"), parameters, strict=False))
        return batch_norm(x, mean, var, training=training, eps=1e-3, **options, **named)

    return function, [x.requires_grad_() for x in (float64(4, 3, 2), *(float64(3) for _ in given))]


@pytest.mark.parametrize("training", MODES)
@affine_cases()
def test_gradients_of_first_and_second_order(given, training):
    function, arguments = problem(given, training)
    assert gradcheck(function, arguments, check_forward_ad=True)
    assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("activation", NAMES)
def test_gradients_with_an_activation_and_a_residual(activation, training):
    function, arguments = problem(("weight", "bias"), training, activation=activation)
    arguments.append(float64(4, 3, 2).requires_grad_())
    assert gradcheck(function, arguments)
    if activation in SMOOTH:
        assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("needed", range(3))
def test_a_gradient_that_is_not_needed_is_not_taken(needed):
    arguments = [float64(4, 3), float64(3), float64(3)]
    arguments[needed].requires_grad_()
    x, weight, bias = arguments
    batch_norm(x, None, None, weight, bias, training=True).sum().backward()
    assert [t.grad is not None for t in arguments] == [i == needed for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@affine_cases()
def test_evaluation_s_gradient_is_of_the_statistics_at_the_time(given, dtype):
    # Evaluate, train, then go backward, as in adversarial training and in consistency losses: the training
    # step moves the running statistics in place, and autograd must not have kept the very buffers.
    arguments = [
        torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((4, 3), *((3,) for _ in given))
    ]
    mean, var = (t.to(dtype) for t in running())

    def formula(x, weight=1, bias=0):
        mean, var = running()
        return (weight * (x - mean) / (var + 1e-5).sqrt() + bias).sin().sum()

    y = batch_norm(arguments[0], mean, var, **dict(zip(given, arguments[1:], strict=True)))
    batch_norm(3 * torch.randn(8, 3) + 1, mean, var, training=True)
    assert not torch.isclose(mean.double(), running()[0]).any()
    found = torch.autograd.grad(y.sin().sum(), arguments)
    exact = [a.detach().double().requires_grad_() for a in arguments]
    named = dict(zip(given, exact[1:], strict=True))
    expected = torch.autograd.grad(formula(exact[0], **named), exact)
    near = 1e-13 if dtype == torch.float64 else 1e-5
    assert_close([g.double() for g in found], list(expected), rtol=near, atol=near)


def test_a_layer_is_evaluated_trained_and_only_then_differentiated():
    layer, x = BatchNorm1d(3, dtype=torch.float64), float64(4, 3).requires_grad_()
    layer(float64(8, 3))
    scale = layer.weight.detach() / (layer.get_buffer("running_var") + layer.eps).sqrt()
    y = layer.eval()(x)
    layer.train()(float64(8, 3) + 1)
    y.sum().backward()
    assert_close(x.grad, scale.expand(4, 3))


# --- torch.func


def both(training):
    """Ours and torch's, of (input, weight, bias)."""
    statistics = (None, None) if training else running()
    return [lambda x, w, b, f=f: f(x, *statistics, w, b, training) for f in (batch_norm, torch_batch_norm)]


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda *a: f(*a).square().sum() + f(*a).exp().sum(), argnums=(0, 1, 2)),
    "jvp": lambda f: lambda *a: torch.func.jvp(f, a, tuple(torch.ones_like(t).cumsum(0) for t in a)),
    "vjp": lambda f: lambda *a: torch.func.vjp(f, *a)[1](a[0].sin()),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 1, 2)),
    "vmap": lambda f: lambda x, w, b: torch.vmap(f, in_dims=(0, None, None))(torch.stack([x, x.exp()]), w, b),
    "vmap of an ensemble": lambda f: (
        lambda x, w, b: torch.vmap(f, in_dims=(None, 0, 0))(x, torch.stack([w, -w]), torch.stack([b, 2 * b]))
    ),
    "vmap of grad": lambda f: (
        lambda x, w, b: torch.vmap(
            torch.func.grad(lambda *a: f(*a).exp().sum(), argnums=(0, 1, 2)), in_dims=(0, None, None)
        )(torch.stack([x, x.exp()]), w, b)
    ),
}


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_agree_with_torch_s(transform, training):
    arguments = float64(4, 3, 2), float64(3), float64(3)
    ours, torch_s = (TRANSFORMS[transform](f)(*arguments) for f in both(training))
    assert_close(ours, torch_s)


@pytest.mark.parametrize("training", MODES)
def test_the_hessian_is_that_of_the_formula(training):
    # Not torch's layer: in torch 2.14 torch.func's hessian of it is wrong in ∂²/∂weight∂input, in training.
    def formula(x, weight, bias):
        mean, var = (x.mean((0, 2)), x.var((0, 2), correction=0)) if training else running()
        x_hat = (x - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
        return weight[:, None] * x_hat + bias[:, None]

    arguments = float64(4, 3, 2), float64(3), float64(3)
    ours, expected = (
        torch.func.hessian(lambda *a, f=f: f(*a).exp().sum(), argnums=(0, 1, 2))(*arguments)
        for f in (both(training)[0], formula)
    )
    assert_close(ours, expected)


@pytest.mark.parametrize("track_running_stats", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_ensemble_of_layers_trains_under_vmap(momentum, track_running_stats):
    # The counters are mapped too, so nothing may ask for their values.
    options = {"momentum": momentum, "track_running_stats": track_running_stats, "dtype": torch.float64}
    ours = [BatchNorm1d(3, **options) for _ in range(4)]
    torch_s = [nn.BatchNorm1d(3, **options) for _ in range(4)]
    for mine, its in zip(ours, torch_s, strict=True):
        nn.init.normal_(mine.weight)
        its.load_state_dict(mine.state_dict())
    parameters, buffers = torch.func.stack_module_state(ours)

    def call(parameters, buffers, x):
        return torch.func.functional_call(ours[0], (parameters, buffers), (x,))

    for _ in range(3):
        x = float64(4, 8, 3) + torch.arange(4).reshape(4, 1, 1)
        y = torch.vmap(call)(parameters, buffers, x)
        assert_close(y, torch.stack([layer(one) for layer, one in zip(torch_s, x, strict=True)]))
    for name, values in torch.func.stack_module_state(torch_s)[1].items():
        assert_close(buffers[name], values)


def test_an_ensemble_skips_the_bad_batches_of_each_member():
    ours = [BatchNorm1d(3) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(ours)
    x = torch.randn(3, 8, 3)
    x[1, 0, 0] = torch.nan
    torch.vmap(lambda p, b, x: torch.func.functional_call(ours[0], (p, b), (x,)))(parameters, buffers, x)
    assert buffers["num_batches_tracked"].tolist() == [1, 0, 1]
    assert buffers["running_mean"].any(1).tolist() == [True, False, True]
