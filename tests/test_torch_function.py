"""To those who watch: torch.fx, __torch_function__, derivatives with respect to statistics, lists of buffers."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import batchnorm as bn
from tests.mutations.mutation import Mutation

OPTIONS: dict[str, Any] = {"training": True, "momentum": 0.3, "eps": 1e-3, "activation": "relu"}


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, x, residual):
        statistics = self.get_buffer("mean"), self.get_buffer("variance")
        y = bn.batch_norm(x, *statistics, self.weight, None, residual=residual, **OPTIONS)
        return y + 1


def test_it_is_one_node_of_a_graph():
    model = Functional()
    traced = fx.symbolic_trace(copy.deepcopy(model))
    calls = [node for node in traced.graph.nodes if node.target is bn.batch_norm]
    assert len(calls) == 1
    assert sum(node.op.startswith("call") for node in traced.graph.nodes) == 2
    x, residual = torch.randn(2, 5, 3).unbind()
    assert_close(traced(x, residual), model(x, residual))
    assert_close(traced.state_dict(), model.state_dict())


def test_it_dispatches_torch_function():
    seen = []

    class Seeing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append((function, sorted(kwargs or {})))
            return "its own answer"

    x, statistic = torch.randn(5, 3), torch.zeros(3)
    calls: list[tuple[Any, ...]] = [
        (x.as_subclass(Seeing), None, None),
        (x, statistic.as_subclass(Seeing), statistic),
        (x, None, None, statistic.as_subclass(Seeing)),
    ]
    for arguments in calls:
        assert bn.batch_norm(*arguments, activation="relu") == "its own answer"
    assert bn.batch_norm(x, None, None, training=True, residual=x.as_subclass(Seeing)) == "its own answer"
    assert seen == [(bn.batch_norm, ["activation", "mask", "residual"])] * 4


def test_a_mode_sees_it():
    seen = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x = torch.randn(5, 3)
    with Watching():
        y = bn.batch_norm(x, None, None, training=True)
    assert seen[0] is bn.batch_norm
    assert_close(y, bn.batch_norm(x, None, None, training=True))


# --- running statistics are constants, as torch's are


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", [0, 1])
def test_a_gradient_of_running_statistics_is_torch_s_error(training, place):
    x = torch.randn(5, 3)

    def call(function, values):
        statistics = [torch.zeros(3), torch.ones(3)]
        statistics[place] = values
        return function(x, *statistics, training=training).sin().sum()

    name = ("running_mean", "running_var")[place]
    message = f"not differentiable with respect to argument '{name}'"
    for function in (torch.nn.functional.batch_norm, bn.batch_norm):
        with pytest.raises(RuntimeError, match=message):
            call(function, torch.ones(3, requires_grad=True))
        with pytest.raises(RuntimeError, match=message):
            grad(lambda values, function=function: call(function, values))(torch.ones(3))
    with torch.no_grad():
        call(bn.batch_norm, torch.ones(3, requires_grad=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own use of it
@pytest.mark.parametrize("kernels", ["native", "torch", "reference"])
def test_a_tangent_of_running_statistics_goes_nowhere_as_torch_s(kernels):
    x = torch.randn(5, 3)

    def call(mean, variance):
        return bn.batch_norm(x, mean, variance)

    given, tangents = (torch.zeros(3), torch.ones(3)), (torch.ones(3), torch.ones(3))
    with bn.kernels.use(kernels):
        found = jvp(call, given, tangents)[1]
        assert not found.any()
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(*each) for each in zip(given, tangents, strict=True)]
            assert forward_ad.unpack_dual(call(*dual)).tangent is None
            assert forward_ad.unpack_dual(torch.nn.functional.batch_norm(x, *dual)).tangent is None


@pytest.mark.parametrize("transform", [lambda f: grad(lambda x: f(x).sum()), vmap], ids=["grad", "vmap"])
def test_what_torch_func_does_not_allow_names_the_way_out(transform):
    layer, x = bn.BatchNorm1d(3), torch.randn(2, 5, 3)
    x = x if transform is vmap else x[0]
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"track_running_stats=False.*functional_call") as refused:
        transform(layer)(x)
    assert "in layer" in refused.value.__notes__[0]
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    transform(bn.BatchNorm1d(3, track_running_stats=False))(x)
    transform(layer.eval())(x)
    layers = [bn.BatchNorm1d(3) for _ in range(2)]
    state = stack_module_state(layers)
    vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,)))(*state, torch.randn(2, 5, 3))
    assert state[1]["num_batches_tracked"].tolist() == [1, 1]


# --- buffers


def test_a_layer_has_torch_s_buffers():
    ours, theirs = (
        [name for name, _ in kind(3).named_buffers()] for kind in (bn.BatchNorm2d, nn.BatchNorm2d)
    )
    assert ours == theirs


def test_an_average_over_pairs_of_buffers():
    # as it is written by hand everywhere: parameters and buffers of two models, by position
    theirs = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    ours, _ = bn.upgrade(copy.deepcopy(theirs))
    ours(torch.randn(8, 3))
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert mine.shape == other.shape
        other.copy_(mine)
    assert_close(theirs.state_dict(), {**theirs.state_dict(), **dict(ours.named_buffers())})


def test_the_counter_goes_where_the_layer_goes():
    layer = bn.BatchNorm1d(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(torch.full((4, 3), torch.nan))
    assert layer.num_batches_skipped == 1
    assert copy.deepcopy(layer).num_batches_skipped == 1
    counter = layer.half().num_batches_skipped
    assert counter is not None and counter.dtype == torch.int64
    counter = layer.to("meta").num_batches_skipped
    assert counter is not None and counter.is_meta
    assert layer.to_empty(device="cpu").num_batches_skipped == 0


MUTATIONS = [
    Mutation(
        "no __torch_function__", "functional.py",
        "if has_torch_function(tensors):", "if False:",
        "torch.fx looks into the function and fails",
    ),
    Mutation(
        "running statistics with a tangent", "kernels/reference.py",
        "constants = mean.detach().clone(), variance.detach()", "constants = mean.clone(), variance",
        "they are constants",
    ),
    Mutation(
        "the counter stays where it was made", "running/tracking.py",
        "self.num_batches_skipped = fn(skipped)", "pass",
        "a device more in every training step",
    ),
]  # fmt: skip
