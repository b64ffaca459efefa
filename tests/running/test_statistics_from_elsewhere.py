"""Running statistics that somebody else loads, estimates or resets, and those that nobody ever gives."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

import batchnorm as bn
from tests.mutations.mutation import Mutation

X = torch.randn(64, 3) * 2 + 1


def given(count=0):
    """A checkpoint with statistics, of so many batches; None: without their number, as old ones are."""
    state = nn.BatchNorm1d(3).state_dict()
    state["running_mean"].fill_(5.0)
    state["running_var"].fill_(4.0)
    if count is None:
        del state["num_batches_tracked"]
    else:
        state["num_batches_tracked"].fill_(count)
    return state


AVERAGES: dict[str, dict[str, Any]] = {
    "debiased": {"debiased": True},
    "cumulative": {"momentum": None},
    "slow": {"momentum": 0.01, "debiased": True},
}


def weight_of_next(layer):
    """That of the next batch, by what it does to a mean of 5."""
    layer(X)
    return ((layer.running_mean - 5) / (X.mean(0) - 5)).mean().item()


EXPECTED = {"debiased": 0.1, "cumulative": 0.1, "slow": 0.01}
each_average = pytest.mark.parametrize("name", AVERAGES)


@each_average
@pytest.mark.parametrize("count", [0, None])
def test_loaded_without_their_number_they_are_kept(name, count):
    layer = bn.BatchNorm1d(3, **AVERAGES[name])
    layer.load_state_dict(given(count), strict=False)
    assert weight_of_next(layer) == pytest.approx(EXPECTED[name], rel=2e-3)


@each_average
def test_their_number_goes_on_into_the_next_checkpoint(name):
    layer, other = (bn.BatchNorm1d(3, **AVERAGES[name]) for _ in range(2))
    layer.load_state_dict(given())
    assert layer.num_batches_tracked == 0  # as it was saved, until a batch comes
    layer(X)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    layer(X)
    other(X)
    assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


@each_average
def test_with_their_number_they_count_as_that(name):
    layer, other = (bn.BatchNorm1d(3, **AVERAGES[name]) for _ in range(2))
    layer.load_state_dict(given(3))
    for each in (layer, other):
        assert each.num_batches_tracked == (3 if each is layer else 0)
    share = {"debiased": 0.1 / (1 - 0.9**4), "cumulative": 1 / 4, "slow": 0.01 / (1 - 0.99**4)}[name]
    assert weight_of_next(layer) == pytest.approx(share, rel=1e-4)


@each_average
def test_what_a_new_layer_begins_with_counts_as_nothing(name):
    layer = bn.BatchNorm1d(3, **AVERAGES[name])
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict())
    layer(X)
    assert_close(layer.running_mean, X.mean(0))
    assert layer.num_batches_tracked == 1


def test_a_plain_average_needs_no_number():
    layer = bn.BatchNorm1d(3)
    layer.load_state_dict(given())
    assert layer.num_batches_tracked == 0
    assert weight_of_next(layer) == pytest.approx(0.1, rel=1e-4)


@each_average
def test_loaded_for_a_domain(name):
    layer = bn.BatchNorm1d(3, **AVERAGES[name])
    state = layer.state_dict() | {
        f"domains.night.{key}": value for key, value in given().items() if "running" in key
    }
    state["domains.night.num_batches_tracked"] = torch.tensor(0)
    layer.load_state_dict(state)
    with bn.domain("night"):
        layer(X)
        mean, _ = layer.running_statistics()
        assert ((mean - 5) / (X.mean(0) - 5)).mean().item() == pytest.approx(EXPECTED[name], rel=2e-3)


@each_average
@pytest.mark.parametrize("domain", [None, "night"])
def test_adapted_they_are_kept(name, domain):
    layer = bn.BatchNorm1d(3, **AVERAGES[name])
    target = torch.randn(1000, 3) + 5
    before = copy.deepcopy(layer.state_dict())
    with bn.domain(domain):
        adaptation = bn.adapt(layer, target.split(10))
        mean = layer.running_statistics()[0].clone()
        layer(X)
        moved = layer.running_statistics()[0]
        assert ((moved - mean).abs() < 0.3 * (X.mean(0) - mean).abs()).all()
        adaptation.reset()
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


def frozen():
    model, _ = bn.freeze(
        nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3), nn.Linear(3, 3), bn.BatchNorm1d(3))
    )
    model[1].load_state_dict(given())
    bn.unfreeze(model[3])
    return model


def test_update_bn_leaves_a_frozen_layer_its_statistics_and_it_says_so():
    model = frozen()
    with pytest.warns(
        RuntimeWarning, match=r"is frozen and keeps its running statistics: bn\.unfreeze"
    ) as seen:
        update_bn(X.split(16), model)
    assert len(seen) == 1
    assert_close(model[1].running_mean, torch.full((3,), 5.0))
    assert_close(model[1].running_var, torch.full((3,), 4.0))
    inputs = model[2](model[1](model[0](X)))
    assert_close(model[3].running_mean, inputs.mean(0))  # the one that follows its batches is estimated again
    assert model[1].momentum == 0.1


def test_what_was_loaded_while_frozen_is_kept_when_it_trains_again():
    layer, _ = bn.freeze(bn.BatchNorm1d(3, debiased=True))
    layer.load_state_dict(given())
    layer(X)
    assert layer.num_batches_tracked == 0
    bn.unfreeze(layer)
    assert weight_of_next(layer) == pytest.approx(0.1, rel=2e-3)


@pytest.mark.slow
def test_compiled_they_are_kept_too():
    layer = bn.BatchNorm1d(3, debiased=True)
    layer.load_state_dict(given())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(X)
    moved = (layer.get_buffer("running_mean") - 5) / (X.mean(0) - 5)
    assert moved.mean().item() == pytest.approx(0.1, rel=2e-3)


def test_unfrozen_update_bn_estimates_it_again():
    model = frozen()
    bn.unfreeze(model)
    update_bn(X.split(16), model)
    assert_close(model[1].running_mean, model[0](X).mean(0))


def test_a_frozen_layer_that_has_seen_nothing_has_nothing_to_keep():
    bn.BatchNorm1d(3, statistics=bn.Population()).reset_running_stats()


def test_a_frozen_layer_from_the_meta_device_begins_as_a_new_one():
    layer = bn.BatchNorm1d(3, statistics=bn.Population(), device="meta").to_empty(device="cpu")
    assert_close(layer.running_mean, torch.zeros(3))
    assert_close(layer.running_var, torch.ones(3))
    assert layer.num_batches_tracked == 0


def test_batches_of_one_value_alone_warn_once():
    layer = bn.BatchNorm1d(3, on_single="running")
    x = torch.randn(1, 3)
    layer(x)
    with pytest.warns(
        RuntimeWarning, match=r"only batches of one value per channel.*a mean of 0 and a variance of 1"
    ):
        layer(x)
    layer(x)


@pytest.mark.parametrize("how", ["a batch has entered", "loaded"])
def test_with_statistics_they_do_not_warn(how):
    layer = bn.BatchNorm1d(3, on_single="running")
    if how == "loaded":
        layer.load_state_dict(given())
    else:
        layer(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            layer(torch.randn(1, 3))


MUTATIONS = [
    Mutation(
        "loaded statistics begin anew", "running/tracking.py",
        "            self.given = True\n", "",
        "the first batch takes their place",
    ),
    Mutation(
        "adapted statistics begin anew", "calibrate/adapt.py",
        "            layer.take_over()\n", "",
        "the first batch takes their place",
    ),
    Mutation(
        "a frozen layer is reset", "running/tracking.py",
        "if self._frozen() and", "if False and",
        "update_bn leaves it a mean of 0 and a variance of 1",
    ),
    Mutation(
        "the first single batch warns", "running/tracking.py",
        "if self._single_batches > 1 and _known", "if _known",
        "a small batch before the others is nothing to warn of",
    ),
]  # fmt: skip
