"""Forwards that change a value in place: what reads it finds what it found."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.passes.blocks import X, keeps


def changed_input(self, x):
    x = self.conv(x)
    out = self.norm(x)
    x.relu_()
    return self.act(out + x)


def changed_view(self, x):
    x = self.conv(x)
    flat = x.flatten(1)
    out = self.norm(x)
    flat.tanh_()
    return self.act(out + flat.view_as(x))


def changed_under_a_view(self, x):
    x = self.conv(x)
    out = self.norm(x.view_as(x))
    x.tanh_()
    return self.act(out + x)


def changed_by_a_module(self, x):
    x = self.conv(x)
    out = self.norm(x)
    return F.relu(out + self.act(x))


def changed_argument(self, x):
    x = self.conv(x)
    kept = x
    x += self.norm(self.shortcut(x))
    return self.act(x) + kept


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (changed_input, "its input may be modified in place"),
        (changed_view, "its input may be modified in place"),
        (changed_under_a_view, "its input may be modified in place"),
        (changed_argument, "it uses a value again after iadd"),
    ],
)
def test_what_is_changed_in_place_is_read_when_it_was(forward, why):
    keeps(forward, why, gradients=False)


def test_an_activation_that_changes_the_layer_s_input_keeps_its_place():
    keeps(changed_by_a_module, "its input may be modified in place", False, act=nn.ReLU(inplace=True))


def test_the_argument_of_a_forward_is_changed_in_place_as_before():
    def forward(self, x):
        x += self.norm(self.conv(x))
        return self.act(x)

    model = keeps(forward, "no activation follows, but iadd", False)
    x = X.clone()
    assert model.eval()(x) is not None and not torch.equal(x, X)
