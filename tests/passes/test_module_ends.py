"""A layer at the end of a module and what follows the module."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.passes.blocks import Block, Deep, X, doubled, keeps, outcome, sequence
from tests.passes.compare import beside, same, upgraded


class Unit(nn.Module):
    """A convolution and its layer, as many models have it; the activation is the caller's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.inner = nn.ModuleDict({"norm": nn.BatchNorm2d(3)})

    def forward(self, x):
        return self.inner["norm"](self.conv(x))


class Counting(Unit):
    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x + 1)


@pytest.mark.parametrize("end", [sequence, Unit])
def test_a_layer_at_the_end_of_a_module_is_fused_across_its_end(end):
    _, report = upgraded(nn.Sequential(nn.Sequential(end(), nn.Identity()), nn.Tanh()), X)
    assert report.summary == "1 layer: 1 fused"

    def plain(self, x):
        return torch.tanh(self.act(x))

    def residual(self, x):
        return F.relu(self.act(x) + self.shortcut(x))

    for forward, what in ((plain, "tanh"), (residual, "residual, relu")):
        block = Block(forward, act=end())
        del block.norm
        _, report = upgraded(nn.Sequential(block), X)
        assert [layer.what for layer in report.layers] == [what]


class Longer(Unit):
    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)

    def forward(self, x):
        return super().forward(F.silu(self.first(x)))


class Nested(Unit):
    def __init__(self):
        super().__init__()
        self.first = Unit()

    def forward(self, x):
        return super().forward(F.silu(self.first(x)))


@pytest.mark.parametrize(("end", "first"), [(Longer, "first"), (Nested, "first.inner.norm")])
def test_a_module_in_which_more_is_fused_stays_whole(end, first):
    def forward(self, x):
        return F.relu(self.act(self.act(x)) + self.norm(x))

    _, report = upgraded(nn.Sequential(Block(forward, act=end())), X)
    assert outcome(report, "0.norm")[0] == "fused"
    assert outcome(report, f"0.act.{first}") == ("fused", "silu")
    assert outcome(report, "0.act.inner.norm")[0] == "swapped"


def test_a_module_with_a_hook_stays_whole():
    def forward(self, x):
        return F.silu(self.norm(x)) + self.act(x)

    theirs, ours, report = beside(Block(forward, act=doubled(Unit())).double())
    assert outcome(report) == ("fused", "silu")
    same(ours, theirs, X)
    for model in (ours, theirs):
        model.act._forward_hooks.clear()
    same(ours, theirs, X)


def test_an_identity_with_a_hook_is_called():
    def forward(self, x):
        return F.relu(self.act(self.norm(x)))

    keeps(forward, "Identity, which follows, has hooks", act=doubled(nn.Identity()))


class Scaling(Unit):
    scale = 1.0

    def __init__(self):
        super().__init__()
        self.scale = 2.0

    def forward(self, x):
        return super().forward(x * self.scale)


def test_what_a_module_that_was_looked_into_has_read_may_change():
    def forward(self, x):
        return F.silu(self.act(x))

    theirs, ours, report = beside(Block(forward, act=Scaling()).double())
    assert outcome(report, "act.inner.norm") == ("fused", "silu")
    for scale in (2.0, 3.0):
        ours.act.scale = theirs.act.scale = scale
        same(ours, theirs, X)


@pytest.mark.parametrize(
    "end", [Counting, lambda: doubled(nn.Sequential(Unit()))], ids=["differs by mode", "has a hook"]
)
def test_a_layer_at_the_end_of_a_module_that_cannot_be_looked_into_is_not(end):
    _, report = upgraded(nn.Sequential(end(), nn.Tanh()), X)
    assert report.summary == "1 layer: 1 swapped"


def test_a_layer_at_the_end_of_a_sequential_is_fused_with_what_follows_that():
    _, report = upgraded(nn.Sequential(Deep(), Deep()), X)
    assert report.summary == "6 layers: 4 fused, 2 swapped"
    assert outcome(report, "0.body.4.1") == ("fused", "residual, silu")
    assert outcome(report, "0.shortcut.2") == ("swapped", "is the residual of another layer")


def test_a_sequential_with_a_hook_is_called_as_a_whole():
    model = Deep()
    doubled(model.body)
    _, report = upgraded(model, X)
    assert report["body.4.1"].outcome == "swapped"


def test_a_sequential_that_two_blocks_share_is_not_looked_into():
    one, other = Deep(), Deep()
    other.body = one.body
    _, report = upgraded(nn.Sequential(one, other), X)
    assert outcome(report, "0.body.4.1") == ("swapped", "is called from 2 places")
    assert outcome(report, "0.body.1") == ("fused", "silu")
