"""A convolution and its layer in small models, and what an upgrade makes of them."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from tests.passes.compare import upgraded

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()


class Block(nn.Module):
    """A convolution and its layer, with a forward given as a function."""

    def __init__(self, forward=None, act=None, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3, **options)
        self.act = act if act is not None else nn.ReLU()
        self.shortcut = nn.Conv2d(3, 3, 1)
        self.body: Any = forward

    def forward(self, x):
        return self.body(self, x)


def outcome(report, name="norm"):
    layer = report[name]
    return layer.outcome, layer.what or layer.why


def fuses(forward, what="relu", **options):
    model, report = upgraded(Block(forward, **options), X)
    assert outcome(report) == ("fused", what)
    return model


def keeps(forward, why, gradients=True, **options):
    model, report = upgraded(Block(forward, **options), X, gradients=gradients)
    assert report["norm"].outcome == "swapped"
    assert why in report["norm"].why, report["norm"].why
    assert type(model.norm) is bn.BatchNorm2d
    return model


def sequence(*after):
    """A convolution, its layer and what is to follow them."""
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), *after)


def doubled(module):
    """`module` with a hook, so that its output is not what its forward gives."""
    module.register_forward_hook(lambda module, args, y: y * 2)
    return module


class Deep(nn.Module):
    """As a user writes a residual block: what is added to is a Sequential's output."""

    def __init__(self):
        super().__init__()
        self.body = sequence(nn.SiLU(), nn.Dropout(0.5), sequence())
        self.shortcut = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5), nn.BatchNorm2d(3))

    def forward(self, x):
        return F.silu(self.body(x) + self.shortcut(x))
