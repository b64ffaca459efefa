"""`bn.configure`: options of many layers; and `bn.convert_sync(revert=True)`."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from tests.mutations.mutation import Mutation

X = torch.randn(8, 3, 4, 4) * 2 + 1


def network() -> Any:
    body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    return nn.Sequential(body, bn.BatchNorm2d(3))


def test_momentum_and_eps_leave_torch_s_layers_torch_s():
    model, report = bn.configure(network(), momentum=None, eps=1e-2)
    assert report.summary == "3 layers: 3 configured"
    assert report["1"].what == "momentum=None, eps=0.01"
    assert [type(each) for each in model[0]] == [nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm2d]
    assert [each.eps for each in (*model[0][1:], model[1])] == [1e-2] * 3
    assert_close(model[1](X), nn.BatchNorm2d(3, eps=1e-2)(X))


def test_what_torch_s_layers_lack_makes_them_ours():
    model, _ = bn.configure(network(), statistics=bn.Ghost(2), debiased=True, on_single="running")
    for layer in (*model[0][1:], model[1]):
        assert type(layer) is bn.BatchNorm2d
        assert (layer.statistics, layer.debiased, layer.on_single) == (bn.Ghost(2), True, "running")
    expected = bn.BatchNorm2d(3, statistics=bn.Ghost(2))
    assert_close(model[1](X), expected(X))


@pytest.mark.parametrize(
    ("only", "names"),
    [("0.*", ["0.1", "0.2"]), ("*.2", ["0.2"]), (["1", "0.1"], ["0.1", "1"]), ("*", ["0.1", "0.2", "1"])],
)
def test_only_those_that_are_meant(only, names):
    model, report = bn.configure(network(), momentum=0.5, only=only)
    assert [each.name for each in report.layers if each.outcome == "configured"] == names
    assert [name for name, each in model.named_modules() if getattr(each, "momentum", 0.1) == 0.5] == names
    assert all(each.why == "only others were meant" for each in report.layers if each.name not in names)


def test_a_frozen_layer_stays_frozen_and_has_them_when_it_is_unfrozen():
    model, _ = bn.freeze(network())
    bn.configure(model, statistics=bn.Ghost(2))
    assert model[1].statistics == bn.Population(bn.Ghost(2))
    assert bn.unfreeze(model)[0][1].statistics == bn.Ghost(2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "nothing to configure"),
        ({"momentum": 2}, ValueError, "momentum is the weight of the new batch, from 0 to 1"),
        ({"eps": -1}, ValueError, "eps is added to a variance"),
        ({"statistics": "ghost"}, TypeError, "statistics is one of"),
        ({"on_single": "skip"}, ValueError, "on_single is"),
        ({"momentum": 0.1, "only": "head.*"}, ValueError, r"path like 'head\.\*': there are 0\.1, 0\.2, 1"),
        ({"momentum": 0.1, "only": ["1", "2"]}, ValueError, r"path like '2'"),
    ],
)
def test_what_cannot_be_meant_is_an_error_and_changes_nothing(options, error, message):
    model = network()
    before = pickle.dumps(model)
    with pytest.raises(error, match=message):
        bn.configure(model, **options)
    assert pickle.dumps(model) == before


def test_a_layer_that_cannot_become_ours_is_named():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), Own(3))
    with pytest.raises(ValueError, match="1 is Own of"):
        bn.configure(model, debiased=True)
    assert type(model[0]) is nn.BatchNorm2d
    bn.configure(model, momentum=0.5)  # which it has itself
    assert model[1].momentum == 0.5


# --- convert_sync(revert=True)


def test_the_way_back_from_sync():
    model = network()
    bn.convert_sync(model)
    model.append(nn.SyncBatchNorm(3)).append(bn.BatchNorm2d(3, statistics=bn.Ghost(2)))
    bn.freeze(model[1])
    expected = copy.deepcopy(model)(X[:, :3])
    model, report = bn.convert_sync(model, revert=True)
    assert str(report).splitlines() == [
        "0.1  unsynchronized",
        "0.2  unsynchronized",
        "1    unsynchronized",
        "2    unsynchronized",
        "3    left alone      is not synchronized",
        "5 layers: 4 unsynchronized, 1 left alone",
    ]
    assert [each.statistics for each in (*model[0][1:], *model[1:])] == [
        None, None, bn.Population(), None, bn.Ghost(2),
    ]  # fmt: skip
    assert type(model[2]) is bn.BatchNorm
    assert_close(model(X), expected)


MUTATIONS = [
    Mutation(
        "configuring thaws", "passes/configure.py",
        "value = Population(value)", "pass",
        "a frozen layer trains",
    ),
    Mutation(
        "reverting thaws", "passes/convert_sync.py",
        "Population() if isinstance(layer.statistics, Population) else None", "None",
        "a frozen layer trains",
    ),
]  # fmt: skip
