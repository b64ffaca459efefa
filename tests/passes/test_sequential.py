"""What is fused within an `nn.Sequential`, and what is not."""

import collections

import pytest
from torch import nn

from tests.passes.blocks import X, doubled, outcome, sequence
from tests.passes.compare import upgraded


@pytest.mark.parametrize(
    ("module", "activation"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.Hardtanh(0.0, 6.0), "relu6"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Tanh(), "tanh"),
    ],
    ids=str,
)
def test_each_activation_is_fused_by_its_name(module, activation):
    model, report = upgraded(sequence(module), X)
    assert outcome(report, "1") == ("fused", activation)
    assert model[1].activation == activation and type(model[2]) is nn.Identity


def test_a_leaky_relu_of_another_slope_is_fused_as_a_module():
    model, report = upgraded(nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(0.2, inplace=True)), X)
    assert report["0"].what == "LeakyReLU(negative_slope=0.2)"
    assert model[0].activation.negative_slope == 0.2


class MyReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.GELU(), "GELU has no fused kernel"),
        (nn.Hardswish(), "Hardswish has no fused kernel"),
        (nn.Hardtanh(-1.0, 6.0), "Hardtanh has no fused kernel"),
        (nn.PReLU(), "PReLU has no fused kernel"),
        (MyReLU(), "no activation follows, but MyReLU"),
        (doubled(nn.ReLU()), "ReLU, which follows, has hooks"),
        (nn.Conv2d(3, 3, 1), "no activation follows, but Conv2d"),
    ],
    ids=str,
)
def test_what_follows_is_not_fused(module, why):
    model, report = upgraded(nn.Sequential(nn.BatchNorm2d(3), module), X)
    assert outcome(report, "0") == ("swapped", why)
    assert type(model[1]) is type(module)


def test_in_a_sequential_names_order_and_identities_stay():
    steps = collections.OrderedDict(
        norm=nn.BatchNorm2d(3), nothing=nn.Identity(), act=nn.ReLU(), conv=nn.Conv2d(3, 3, 1)
    )
    model, report = upgraded(nn.Sequential(steps), X)
    assert outcome(report) == ("fused", "relu")
    assert [name for name, _ in model.named_children()] == list(steps)


def test_a_shared_activation_is_taken_out_at_each_place():
    act = nn.SiLU()
    _, report = upgraded(nn.Sequential(nn.BatchNorm2d(3), act, nn.BatchNorm2d(3), act, act), X)
    assert report.summary == "2 layers: 2 fused"


def test_a_layer_that_comes_twice_is_not_fused():
    layer = nn.BatchNorm2d(3)
    _, report = upgraded(nn.Sequential(layer, nn.ReLU(), layer, nn.Tanh()), X)
    assert outcome(report, "0") == ("swapped", "is called from 2 places")


def test_a_layer_in_two_sequentials_is_not_fused():
    layer = nn.BatchNorm2d(3)
    _, report = upgraded(nn.Sequential(nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer, nn.Tanh())), X)
    assert outcome(report, "0.0") == ("swapped", "is called from 2 places")


def test_a_sequential_that_comes_twice_is_fused_within():
    body = nn.Sequential(nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 3, 1))
    _, report = upgraded(nn.Sequential(body, body), X)
    assert report.summary == "1 layer: 1 fused"


class Doubled(nn.Sequential):
    def forward(self, x):
        for child in self:
            x = child(child(x))
        return x


def test_a_sequential_with_a_forward_of_its_own_is_traced():
    _, report = upgraded(Doubled(nn.BatchNorm2d(3), nn.Tanh()), X)
    assert outcome(report, "0") == ("swapped", "is called from 2 places")
