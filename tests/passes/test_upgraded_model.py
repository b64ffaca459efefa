"""An upgraded model is a model: copied, pickled, compiled, exported and upgraded again."""

import copy
import io
import pickle
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from tests.passes.blocks import Deep, X, doubled
from tests.passes.compare import beside, near, same, unlike, upgraded


def test_the_block_keeps_its_name_and_is_still_of_its_class():
    model, _ = bn.upgrade(Deep())
    assert isinstance(model, Deep)
    assert (type(model).__name__, type(model).__module__) == ("Deep", Deep.__module__)
    assert str(model).startswith("Deep(")


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def fx_traced(model):
    return torch.fx.symbolic_trace(model)


def replicated(model):
    parts = [(module, module._replicate_for_data_parallel()) for module in model.modules()]
    replicas = dict(parts)
    for module, replica in parts:
        for name, child in module._modules.items():
            if child is not None:
                replica._modules[name] = replicas[child]
        replica._parameters = dict(module._parameters)
    return replicas[model]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.blocks = nn.Sequential(Deep(), Deep(), nn.BatchNorm2d(3), nn.LeakyReLU(0.3))

    def forward(self, x):
        return self.blocks(F.silu(self.norm(x)))


@pytest.mark.slow
@pytest.mark.parametrize("change", [copied, pickled, saved, fx_traced, replicated, copy.copy])
def test_it_survives(change):
    torch.manual_seed(0)
    theirs, ours, report = beside(Net().double())
    assert report.summary == "8 layers: 6 fused, 2 swapped"
    other = change(ours)
    if change in (fx_traced, replicated, copy.copy):
        for training in (True, False):
            with torch.random.fork_rng():
                torch.manual_seed(1)
                actual = other.train(training)(X)
                torch.manual_seed(1)
                near(actual, theirs.train(training)(X))
    else:
        same(other, theirs, X)
        assert other.blocks[0] is not ours.blocks[0]
        assert type(other.blocks[0]) is type(ours.blocks[0])
        with torch.no_grad():
            other.norm.weight.zero_()
        assert (ours.norm.weight != 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_as_one_graph(training):
    model = Net().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    theirs, ours, _ = beside(model)
    compiled = cast(Any, torch.compile(ours, backend="aot_eager", fullgraph=True))
    for _ in range(2):
        near(compiled.train(training)(X), theirs.train(training)(X))


@pytest.mark.slow
def test_what_was_compiled_before_is_compiled_again():
    theirs = unlike(Net().double()).eval()
    ours = copy.deepcopy(theirs)
    compiled = cast(Any, torch.compile(ours, backend="eager"))
    compiled(X)
    _, report = bn.upgrade(compiled)
    assert report.summary == "8 layers: 6 fused, 2 swapped"
    near(compiled(X), theirs(X))


@pytest.mark.slow
def test_it_exports():
    ours, _ = bn.upgrade(unlike(Net()).eval())
    x = X.float()
    near(torch.export.export(ours, (x,)).module()(x), ours(x), 1e-5)


def test_a_graph_is_changed_as_a_graph():
    theirs = torch.fx.symbolic_trace(Net())
    ours, report = upgraded(theirs, X)
    assert report.summary == "8 layers: 6 fused, 2 swapped"
    for change in (copied, pickled, fx_traced):
        near(change(ours).eval()(X), theirs.eval()(X))


def test_a_second_upgrade_changes_nothing():
    ours, _first = bn.upgrade(unlike(Net().double()))
    kinds = [type(module) for module in ours.modules()]
    theirs = copy.deepcopy(ours)
    _, second = bn.upgrade(ours)
    assert [type(module) for module in ours.modules()] == kinds
    assert {layer.outcome for layer in second.layers} == {"left alone"}
    assert {layer.why for layer in second.layers} == {"is ours already"}
    same(ours, theirs, X)


def test_layers_can_be_swapped_first_and_fused_later():
    theirs = unlike(Net().double())
    ours, report = upgraded(Net(), X, fuse=False)
    assert report.summary == "8 layers: 8 swapped" and report["norm"].why == "fuse=False"
    assert type(ours) is Net
    ours.load_state_dict(theirs.state_dict())
    _, report = bn.upgrade(ours)
    assert report.summary == "8 layers: 6 fused, 2 left alone"
    same(ours, theirs, X)


def test_hooks_on_a_block_see_what_they_saw():
    model = Net().double()
    doubled(model.blocks[0]).register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    theirs, ours, report = beside(model)
    assert report["blocks.0.body.4.1"].outcome == "fused"
    same(ours, theirs, X)


def test_frozen_layers_stay_frozen():
    model = Net().double()
    model.norm.eval()
    model.norm.weight.requires_grad_(False)
    _, ours, _ = beside(model)
    assert not ours.norm.training and ours.blocks.training
    assert not ours.norm.weight.requires_grad


def test_in_float32_too():
    _, report = upgraded(Net(), X.float(), tolerance=2e-4)
    assert report.summary == "8 layers: 6 fused, 2 swapped"
