"""Calls of a layer or of its neighbours from elsewhere in the model."""

from typing import Any, NamedTuple

import pytest
from torch import nn

import batchnorm as bn
from tests.passes.blocks import X, outcome, sequence
from tests.passes.compare import near, upgraded


class Parent(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.features = sequence(nn.SiLU())
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def tapped(self, x):
    taps = []
    for layer in self.features:
        x = layer(x)
        taps.append(x)
    return taps


def test_a_sequential_whose_children_are_called_one_by_one_is_not_fused_in_order():
    _, report = upgraded(Parent(tapped), X)
    assert outcome(report, "features.1") == ("swapped", "its output is used 2 times")


def test_children_of_a_sequential_are_fused_where_they_are_called():
    model, report = upgraded(Parent(lambda self, x: self.features[2](self.features[1](x))), X)
    assert outcome(report, "features.1") == ("fused", "silu")
    assert type(model.features[2]) is nn.SiLU


def test_a_layer_that_is_called_within_its_sequential_and_alone_is_not_fused():
    _, report = upgraded(Parent(lambda self, x: self.features(x) + self.features[1](x)), X)
    assert outcome(report, "features.1") == ("swapped", "is called from 2 places")


def test_an_activation_that_is_called_alone_too_stays_in_its_sequential():
    _, report = upgraded(Parent(lambda self, x: self.features[2](self.features(x))), X)
    assert outcome(report, "features.1") == ("swapped", "SiLU, which follows, is called from elsewhere too")


class Undecided(nn.Module):
    """Its forward depends on values, so its text is all there is."""

    features: Any
    blocks: Any

    def __init__(self):
        super().__init__()
        self.features = sequence(nn.SiLU())
        self.blocks = nn.ModuleList([sequence(nn.SiLU()) for _ in range(2)])
        self.pool = None

    def decided(self, x):
        return x if x.sum() > 0 else -x


class CalledWhole(Undecided):
    def forward(self, x):
        x = self.features(self.decided(x))
        for index, block in enumerate(self.blocks):
            x = block(x) * index
        return x + self.blocks[0](x)


class Indexed(Undecided):
    def forward(self, x):
        x = self.features[1](self.decided(x))
        for block in self.blocks:
            x = block[2](block[1](x)) + block[1](x)
        return x


class Iterated(Undecided):
    def forward(self, x):
        x, y = self.decided(x), 0
        for layer in self.features:
            x = layer(x)
            y = y + x
        for block in self.blocks:
            for layer in block:
                x = layer(x)
                y = y + x
        return y


class ByPath(Undecided):
    def forward(self, x):
        x = self.get_submodule("features.1")(self.decided(x))
        return self.get_submodule("blocks.0.1")(x) + self.get_submodule("blocks.1.1")(x)


class InAMethod(Undecided):
    def forward(self, x):
        return self.run(self.decided(x))

    def run(self, x):
        return run(Handle(self.features, self.blocks), x)


class Handle(NamedTuple):
    features: Any
    blocks: Any


class ByName(Undecided):
    def forward(self, x):
        x = self.decided(x)
        return getattr(self, "features")[1](x) + self.blocks[0][1](x) + self.blocks[1][1](x)  # noqa: B009


class HandedOn(Undecided):
    def forward(self, x):
        return run(self, self.decided(x))


def run(model, x):
    return model.features[1](x) + model.blocks[0][1](x) + model.blocks[1][1](x)


class Inherited(Indexed):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Indexed, Iterated, ByName, ByPath, HandedOn, InAMethod, Inherited])
def test_a_forward_that_cannot_be_traced_and_may_reach_into_a_sequential_keeps_it(kind):
    _, report = upgraded(kind(), X)
    assert report.summary == "3 layers: 3 swapped"
    assert "may call it too: the forward of" in report["features.1"].why


def test_a_forward_that_cannot_be_traced_but_calls_its_children_whole_lets_them_be_fused():
    _, report = upgraded(CalledWhole(), X)
    assert report.summary == "3 layers: 3 fused"


def test_a_patched_forward_stays_and_nothing_below_is_touched():
    model = Parent(None)
    vars(model)["forward"] = lambda x: model.features[1](x)
    _, report = bn.upgrade(model)
    assert "it was replaced on the instance" in report["features.1"].why


class Entrance(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.act = act

    def forward_features(self, x):
        return self.act(self.norm(self.conv(x)))

    def forward(self, x):
        return self.forward_features(x).mean((2, 3))


@pytest.mark.parametrize(
    ("act", "what"), [(nn.ReLU(), "relu"), (nn.SiLU(), "is called in forward_features()")]
)
def test_a_public_method_gives_what_it_gave(act, what):
    model, report = upgraded(Entrance(act), X)
    assert outcome(report)[1].startswith(what)
    theirs = Entrance(act).double()
    theirs.load_state_dict(model.state_dict())
    near(model.eval().forward_features(X), theirs.eval().forward_features(X))
