"""`bn.LazyBatchNorm1d/2d/3d`: torch's lazy layers, which become ours."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from tests.mutations.mutation import Mutation

KINDS = [1, 2, 3]
each_rank = pytest.mark.parametrize("rank", KINDS)


def classes(rank):
    """Our lazy class, torch's, and what ours becomes."""
    return tuple(
        getattr(home, f"{lazy}BatchNorm{rank}d") for home, lazy in ((bn, "Lazy"), (nn, "Lazy"), (bn, ""))
    )


def batch(rank):
    return torch.randn(6, 3, *[4] * (rank if rank > 1 else 0))


@each_rank
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.1},
        {"bias": False},
    ],
    ids=str,
)
def test_it_trains_as_torch_s(rank, options):
    ours, theirs, becomes = classes(rank)
    layer, other = ours(**options), theirs(**options)
    for _ in range(2):
        x = batch(rank)
        assert_close(layer(x), other(x))
    assert type(layer) is becomes and layer.num_features == 3
    assert_close(layer.state_dict(), other.state_dict())
    assert vars(layer).keys() == vars(becomes(3, **options)).keys()


def test_it_has_our_options():
    layer = bn.LazyBatchNorm1d(activation="relu", statistics=bn.Ghost(2), debiased=True, on_single="running")
    x = torch.randn(6, 3, 4)
    x[:, 0] = 0
    residual, mask = torch.randn(6, 3, 4), torch.tensor([4, 4, 3, 2, 4, 1])
    other = bn.BatchNorm1d(3, activation="relu", statistics=bn.Ghost(2), debiased=True, on_single="running")
    assert_close(layer(x, residual, mask=mask), other(x, residual, mask))
    assert repr(layer) == repr(other)
    assert_close(layer.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    "options", [{"activation": "rleu"}, {"on_single": "skip"}, {"statistics": 4}], ids=str
)
def test_a_wrong_option_is_an_error_at_once(options):
    with pytest.raises((ValueError, TypeError)):
        bn.LazyBatchNorm2d(**options)


def test_a_checkpoint_makes_it():
    state = bn.BatchNorm2d(3).state_dict()
    state["running_mean"].fill_(5.0)
    layer = bn.LazyBatchNorm2d()
    layer.load_state_dict(state)
    assert_close(layer.state_dict(), state)
    layer.eval()(torch.randn(2, 3, 4, 4))
    assert type(layer) is bn.BatchNorm2d
    assert_close(layer.running_mean, state["running_mean"])


@pytest.mark.parametrize("change", ["half", "double", "to"])
def test_before_its_first_input_it_can_be_moved(change):
    layer = bn.LazyBatchNorm2d()
    layer = {
        "half": lambda: layer.half(),
        "double": lambda: layer.double(),
        "to": lambda: layer.to("cpu"),
    }[change]()
    dtype = {"half": torch.float16, "double": torch.float64}.get(change, torch.float32)
    y = layer(torch.randn(4, 3, 2, 2).to(dtype))
    assert y.dtype == layer.weight.dtype == dtype
    assert layer.get_buffer("running_mean").dtype == (torch.float64 if change == "double" else torch.float32)


def test_frozen_before_its_first_input_it_begins_as_a_new_layer():
    layer = bn.LazyBatchNorm1d(statistics=bn.Population())
    x = torch.randn(6, 3)
    assert_close(layer(x), x / (1 + 1e-5) ** 0.5)
    assert_close(layer.running_var, torch.ones(3))


def test_upgrade_fuses_into_it_once_it_is_made():
    model: nn.Module = nn.Sequential(nn.LazyConv2d(3, 3), bn.LazyBatchNorm2d(), nn.ReLU())
    x = torch.randn(2, 5, 6, 6)
    assert bn.upgrade(model)[1].count("fused") == 0
    model(x)
    model, report = bn.upgrade(model)
    assert report["1"].what == "relu"
    model(x)


MUTATIONS = [
    Mutation(
        "statistics of a lazy layer stay as wide as it", "lazy_layers.py",
        "        cast(_BatchNorm, self)._begin_tracking()\n", "        pass\n",
        "in float16 they stop moving",
    ),
    Mutation(
        "a frozen lazy layer keeps what memory held", "lazy_layers.py",
        "statistics, self.statistics = self.statistics, None", "statistics = self.statistics",
        "it is never initialised",
    ),
]  # fmt: skip
