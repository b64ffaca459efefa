"""Each bug, planted in networks of three kinds, is found at its layer and nothing else is; a fix removes it."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision import models

import batchnorm as bn
from batchnorm.diagnostics.check import checks
from batchnorm.diagnostics.examine import examine

CHECKS = checks()


class Own(nn.Module):
    """Written by hand, with a layer in a list and one in a branch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + torch.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


NETWORKS = {
    "own": (Own, "norms.1"),
    "torchvision": (lambda: models.resnet18(num_classes=4), "layer2.0.bn1"),
    "timm": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=4), "blocks.2.0.bn2"),
}


def healthy(make):
    torch.manual_seed(0)
    model = make()
    bn.population(model, [torch.randn(8, 3, 64, 64) for _ in range(2)])
    return model.train(), torch.optim.SGD(bn.param_groups(model, 1e-4), lr=0.1)


@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_is_found_in_a_healthy_network(network):
    model, optimizer = healthy(NETWORKS[network][0])
    before = copy.deepcopy(model.state_dict())
    assert list(examine(model, optimizer=optimizer)) == []
    assert list(examine(model.eval(), optimizer=optimizer)) == []
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.code}-{check.name}")
@pytest.mark.parametrize("network", NETWORKS)
def test_a_planted_bug_is_found_at_its_layer_and_nothing_else(network, check):
    make, path = NETWORKS[network]
    model, optimizer = healthy(make)
    check.plant(model, path)
    found = examine(model, optimizer=optimizer)
    assert [(each.code, each.layer, each.severity) for each in found] == [(check.code, path, check.severity)]
    assert found[0].message and found[0].fix
    assert list(examine(model, optimizer=optimizer, ignore=[check.code])) == []
    assert len(examine(model, optimizer=optimizer, select=[check.code])) == 1
    assert check.code in str(found) and path in str(found)


@pytest.mark.parametrize(
    "check", [each for each in CHECKS if "fix" in vars(type(each))], ids=lambda check: check.code
)
def test_a_fix_removes_it(check):
    make, path = NETWORKS["own"]
    model, optimizer = healthy(make)
    check.plant(model, path)
    (finding,) = examine(model, optimizer=optimizer)
    check.fix(model, finding)
    assert list(examine(model, optimizer=optimizer)) == []
    model(torch.randn(4, 3, 16, 16)).sum().backward()


def test_codes_are_stable_and_each_says_why():
    assert [each.code for each in CHECKS] == ["BN201", "BN202", "BN203", "BN204", "BN205", "BN301"]
    for each in CHECKS:
        assert each.symptom and each.why and each.source and each.name


def test_an_unknown_code_is_refused():
    with pytest.raises(ValueError, match=r"no check 'BN9': BN201"):
        examine(nn.BatchNorm2d(3), select=["BN9"])


def test_frozen_layers_are_no_bug():
    model, _ = bn.upgrade(healthy(Own)[0])
    bn.freeze(model, affine=True)
    assert list(examine(model)) == []


def test_the_order_and_the_summary():
    model: Any
    model, optimizer = healthy(Own)
    model.norms[0].momentum = 0.99
    model.norms[1].running_var[0] = -1
    found = examine(model, optimizer=optimizer)
    assert [each.code for each in found] == ["BN202", "BN201"] and found.summary == "1 error, 1 warning"
    assert found[0].evidence == {"channels": 1}
    assert examine(nn.Linear(2, 2)).summary == "nothing found"
