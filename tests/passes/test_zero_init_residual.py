"""`bn.zero_init_residual` against torchvision's option of that name and timm's `zero_init_last`."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

import batchnorm as bn
from tests.mutations.mutation import Mutation

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def zeros(model):
    return {
        name
        for name, p in model.named_parameters()
        if p.dim() == 1 and name.endswith("weight") and bool((p == 0).all())
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
@pytest.mark.parametrize("upgraded", [False, True])
def test_torchvision_s_option(name, upgraded):
    expected = zeros(models.get_model(name, weights=None, zero_init_residual=True))
    model = models.get_model(name, weights=None)
    if upgraded:  # the sum and the activation are in the layer
        model, _ = bn.upgrade(model)
    model, report = bn.zero_init_residual(model, X)
    assert zeros(model) == expected and report.count("zeroed") == len(expected) > 0


@pytest.mark.parametrize(
    "name",
    [
        "resnet26", "seresnet50", "skresnet18", "resnest14d", "regnety_002", "regnetz_b16", "cspresnet50",
        "res2net50_26w_4s", "darknet53", "resnetv2_50", "repvgg_a0",
    ],
)  # fmt: skip
def test_timm_s_option(name):
    expected = zeros(timm.create_model(name, zero_init_last=True))
    model, report = bn.zero_init_residual(timm.create_model(name, zero_init_last=False), X)
    assert zeros(model) == expected and report.count("zeroed") == len(expected)


class Block(nn.Module):
    """A forward of one's own: two branches, a shortcut with a projection, ReLU behind a branch."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv1, self.conv2, self.short = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(3) for _ in range(3))
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        match self.kind:
            case "plain":
                return x + y
            case "projection":
                return F.relu(self.bn3(self.short(x)).add_(y))
            case "subtracted":
                return x - 0.5 * F.dropout(y, 0.2, self.training)
            case "behind relu":
                return x + F.relu(y)
            case "no branch":
                return self.bn3(x) + self.bn1(x)
            case "by 0":
                return x + y * self.zero
            case "squared":
                return x + y * y
            case "shared":
                return x + self.bn2(self.conv2(F.relu(self.bn2(self.conv1(x)))))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", {"bn2"}),
        ("projection", {"bn2"}),
        ("subtracted", {"bn2"}),
        ("behind relu", set()),
        ("no branch", set()),
        ("shared", set()),
        ("by 0", set()),
        ("squared", set()),
    ],
)
def test_forwards_of_one_s_own(kind, expected):
    model, report = bn.zero_init_residual(Block(kind), X)
    assert {row.name for row in report.layers if row.outcome == "zeroed"} == expected
    assert zeros(model) == {f"{name}.weight" for name in expected}
    if kind in ("plain", "subtracted"):
        torch.testing.assert_close(model.train()(X), X)
        model(X).square().sum().backward()
        assert model.bn2.weight.grad is not None and bool((model.bn2.weight.grad != 0).any())


def test_frozen_and_non_affine_layers_are_left_alone_and_named():
    model: Any = Block("plain")
    model.bn2.weight.requires_grad_(False)
    _, report = bn.zero_init_residual(model, X)
    assert "requires no gradient" in report["bn2"].why
    model.bn2 = nn.BatchNorm2d(3, affine=False)
    _, report = bn.zero_init_residual(model, X)
    assert "no weight of its own" in report["bn2"].why
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        bn.zero_init_residual(model, X[:, :2])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_weight_that_is_another_layer_s_too_is_left_alone():
    model: Any = Block("plain")
    model.bn2.weight = model.bn1.weight
    model, report = bn.zero_init_residual(model, X)
    assert report.count("zeroed") == 0 and "another layer's" in report["bn2"].why
    assert bool((model.bn1.weight == 1).all())


MUTATIONS = [
    Mutation(
        "zero_init_residual: shortcuts are branches too",
        "graph/residual.py",
        "        return bool(beside & (self._before(branch) - own)) and not own & (self._before(shortcut) - beside)",
        "        return True",
        "both would be zero, and the block dead",
    ),
    Mutation(
        "zero_init_residual: through ReLU",
        "graph/residual.py",
        '("silu", ',
        '("relu", "silu", ',
        "its weight would get no gradient",
    ),
]
