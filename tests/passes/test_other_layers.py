"""Layers that are not quite torch's own: left alone, all but timm's with an activation."""

from typing import Any, cast

import pytest
import torch
from torch import nn

import batchnorm as bn
from tests.passes.blocks import X, outcome
from tests.passes.compare import upgraded


class Subclass(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def parametrized():
    layer = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


def patched():
    layer = nn.BatchNorm2d(3)
    vars(layer)["forward"] = lambda x: x * 3
    return layer


def with_activation_of_its_own():
    layer = nn.BatchNorm2d(3)
    vars(layer)["activation"] = "mine"
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Subclass(3), f"is Subclass of {__name__}"),
        (parametrized, "parametrizations"),
        (patched, "its forward was replaced on the instance"),
        (with_activation_of_its_own, "has an attribute activation of its own"),
        (lambda: bn.BatchNorm2d(3, activation="relu"), "is ours already"),
    ],
)
def test_is_left_alone(make, why):
    layer = make()
    kind = type(layer)
    model, report = upgraded(nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.ReLU()), X)
    assert report["1"].outcome == "left alone" and why in report["1"].why
    assert model[1].__class__.__name__ == kind.__name__ and type(model[2]) is nn.ReLU


@pytest.mark.parametrize("layer", [nn.SyncBatchNorm(3), nn.LazyBatchNorm2d()], ids=["sync", "lazy"])
def test_another_class_of_torch_s_is_left_alone(layer):
    kind = type(layer)
    model, report = bn.upgrade(nn.Sequential(layer))
    assert report["0"].outcome == "left alone" and type(model[0]) is kind


def test_a_lazy_layer_is_swapped_once_it_knows_its_size():
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    model(X.float())
    assert bn.upgrade(model)[1].summary == "1 layer: 1 fused"


def test_a_layer_whose_weight_is_computed_is_left_alone():
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.BatchNorm2d(3))
    _, report = bn.upgrade(nn.Sequential(layer))
    assert "its weight is not a plain one" in report["0"].why and type(layer) is nn.BatchNorm2d


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_module_is_left_alone():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())), nn.BatchNorm2d(3))
    _, report = bn.upgrade(model)
    assert report["0.0"].outcome == "left alone" and "torch.jit" in report["0.0"].why
    assert report["1"].outcome == "swapped"


def test_torchvision_s_frozen_layer_is_left_alone():
    frozen = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(3)
    model, report = upgraded(nn.Sequential(frozen, nn.ReLU()), X)
    assert report["0"].outcome == "left alone" and type(model[1]) is nn.ReLU


def test_only_a_module_can_be_upgraded():
    with pytest.raises(TypeError, match=r"pass an instance, BatchNorm2d\(\.\.\.\)"):
        bn.upgrade(cast(Any, nn.BatchNorm2d))
    with pytest.raises(TypeError, match="not dict"):
        bn.upgrade(cast(Any, {}))


def test_timm_s_layer_with_an_activation_is_understood():
    layer = pytest.importorskip("timm.layers").BatchNormAct2d
    for act, activation in ((nn.ReLU, "relu"), (nn.SiLU, "silu"), (nn.Identity, None)):
        model, report = upgraded(nn.Sequential(nn.Conv2d(3, 3, 1), layer(3, act_layer=act)), X)
        assert model[1].activation == activation
        assert outcome(report, "1") == (
            ("fused", activation) if activation else ("swapped", "no activation follows")
        )
        assert type(model[1]) is bn.BatchNorm2d
        assert isinstance(model[1].act, act) and isinstance(model[1].drop, nn.Identity)
    for other in (nn.PReLU, nn.Hardswish):
        model, report = upgraded(nn.Sequential(layer(3, act_layer=other, inplace=False)), X)
        assert model[0].activation is model[0].act
        assert outcome(report, "0") == ("swapped", f"{other.__name__} has no fused kernel")


def test_timm_s_layer_that_drops_is_left_alone():
    layer = pytest.importorskip("timm.layers").BatchNormAct2d
    _model, report = bn.upgrade(layer(3, drop_layer=nn.Dropout))
    assert report[""].outcome == "left alone" and "drops between" in report[""].why
