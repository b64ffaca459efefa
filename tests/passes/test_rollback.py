"""A pass that fails half-way leaves the model as it was."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.passes import convert_sync, freeze, upgrade
from batchnorm.passes.rollback import unchanged_on_failure


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.seen: list[int] = []

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


def model():
    graph = fx.symbolic_trace(Block())
    return nn.Sequential(
        Block(), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.ModuleDict({"g": graph})["g"]
    )


def fingerprint(model):
    return [
        (name, type(each), sorted(vars(each)), {**each._buffers}, {**each._modules}, each.training)
        for name, each in model.named_modules()
    ]


def same(before, after):
    for one, other in zip(before, after, strict=True):
        assert one[:3] == other[:3]
        assert all(one[3][name] is other[3][name] for name in one[3])
        assert one[4] == other[4]


@pytest.mark.parametrize(
    ("run", "module", "name"),
    [
        (lambda model: bn.upgrade(model), upgrade, "Report"),
        (lambda model: bn.upgrade(model), upgrade, "_in_block"),
        (lambda model: bn.freeze(model, affine=True), freeze, "_require_gradients"),
        (lambda model: bn.convert_sync(model), convert_sync, "Sync"),
    ],
)
def test_a_pass_that_fails_half_way_leaves_the_model_as_it_was(monkeypatch, run, module, name):
    one = nn.Sequential(Block(), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).half()
    other = copy.deepcopy(one)
    before = fingerprint(one)

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, fails)
    with pytest.raises(KeyboardInterrupt):
        run(one)
    same(before, fingerprint(one))
    x = torch.randn(2, 3, 8, 8).half()
    assert_close(one(x), other(x), rtol=0, atol=0)
    assert all(each.requires_grad for each in one.parameters())


def test_classes_children_attributes_and_graphs_come_back():
    one = model()
    x = torch.randn(2, 3, 8, 8)
    expected, before = one[2](x), fingerprint(one)

    def fail():
        one[0].__class__ = type("Other", (Block,), {})
        one[0].seen.append(1)
        one[0].extra = 1
        del one[0].norm
        one[1][1] = nn.Identity()
        one[1][0].register_buffer("running_mean", torch.ones(4))
        one[1][0].register_forward_hook(lambda *_: None)
        one[2].graph = fx.symbolic_trace(nn.Identity()).graph
        raise RuntimeError

    with pytest.raises(RuntimeError), unchanged_on_failure(one):
        fail()
    same(before, fingerprint(one))
    assert one[0].seen == []
    assert not one[1][0]._forward_hooks
    one[2].norm.reset_running_stats()
    assert_close(one[2](x), expected)


def test_what_succeeds_stays():
    one = model()
    with unchanged_on_failure(one):
        one[0].extra = 1
    assert one[0].extra == 1
