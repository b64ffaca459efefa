"""`upgrade` makes torch's layers ours: what it keeps."""

import copy
import operator

import torch
from torch import nn

import batchnorm as bn
from tests.constructors import each_layer, each_setting
from tests.passes.blocks import Block, outcome
from tests.passes.compare import near, unlike, upgraded


@each_setting
@each_layer
def test_a_root_of_each_kind_becomes_ours(ours, torch_s, shape, options):
    x = torch.randn(shape).double()
    model, report = upgraded(torch_s(3, **options), x)
    assert type(model) is ours
    assert outcome(report, "") == ("swapped", "no call of it was found")


def test_a_layer_keeps_everything_and_stays_where_it_is():
    model = Block(operator.methodcaller("conv"), eps=0.1, momentum=0.3).half().eval()
    layer = model.norm
    layer.weight.requires_grad_(False)
    vars(layer)["note"] = object()
    layer.register_buffer("extra", torch.ones(2))
    before = dict(vars(layer))
    parameters = {name: id(value) for name, value in layer.named_parameters()}
    assert bn.upgrade(model)[0] is model
    assert model.norm is layer and type(layer) is bn.BatchNorm2d
    assert {name: id(value) for name, value in layer.named_parameters()} == parameters
    assert all(vars(layer)[name] is value for name, value in before.items())
    assert not layer.weight.requires_grad and layer.bias.requires_grad and not layer.training
    assert layer.weight.dtype == torch.float16
    assert {layer.get_buffer(name).dtype for name in ("running_mean", "running_var")} == {torch.float32}
    assert layer.num_batches_skipped == 0


def test_buffers_are_the_same_objects():
    layer = nn.BatchNorm1d(3)
    buffers = dict(layer.named_buffers())
    bn.upgrade(layer)
    assert all(getattr(layer, name) is value for name, value in buffers.items())
    assert "num_batches_skipped" not in layer.state_dict()


def test_an_optimiser_goes_on():
    torch.manual_seed(0)
    models = [unlike(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1)).double())]
    models.append(copy.deepcopy(models[0]))
    optimisers = [torch.optim.Adam(model.parameters(), lr=0.1) for model in models]
    for step in range(4):
        if step == 2:
            bn.upgrade(models[1])
        x = torch.randn(8, 3).double()
        for model, optimiser in zip(models, optimisers, strict=True):
            optimiser.zero_grad()
            model(x).square().sum().backward()
            optimiser.step()
    for a, b in zip(models[1].state_dict().values(), models[0].state_dict().values(), strict=True):
        near(a, b)


def test_hooks_of_every_kind_go_on_and_can_be_removed():
    seen = []

    def hook(name):
        return lambda *_, **__: seen.append(name)

    layer = nn.BatchNorm1d(3).double()
    handles = [
        layer.register_forward_hook(hook("forward")),
        layer.register_forward_pre_hook(hook("pre"), with_kwargs=True),
        layer.register_full_backward_hook(hook("backward")),
        layer.register_full_backward_pre_hook(hook("backward pre")),
        layer.register_state_dict_post_hook(hook("state")),
        layer.register_state_dict_pre_hook(hook("state pre")),
        layer.register_load_state_dict_pre_hook(hook("load pre")),
        layer.register_load_state_dict_post_hook(hook("load")),
    ]
    model = nn.Sequential(layer, nn.ReLU())
    _, report = bn.upgrade(model)
    assert outcome(report, "0") == ("swapped", "has hooks, which would see the fused output")

    def use():
        seen.clear()
        model(torch.randn(4, 3).double().requires_grad_()).sum().backward()
        model.load_state_dict(model.state_dict())
        return set(seen)

    assert len(use()) == len(handles)
    for handle in handles:
        handle.remove()
    assert use() == set()


def test_a_shared_layer_stays_shared():
    layer = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
    held = [layer]
    _, report = bn.upgrade(model)
    assert model.get_submodule("a.0") is model.get_submodule("b.0") is held[0]
    assert [entry.name for entry in report.layers] == ["a.0"]


def test_a_checkpoint_moves_both_ways():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LeakyReLU(0.2))
    ours, _ = bn.upgrade(copy.deepcopy(model))
    assert list(ours.state_dict()) == list(model.state_dict())
    assert model.load_state_dict(ours.state_dict()) == ours.load_state_dict(model.state_dict()) == ([], [])


def test_on_meta_it_upgrades_what_has_no_values():
    with torch.device("meta"):
        model, report = bn.upgrade(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    assert report.summary == "1 layer: 1 fused"
    assert model[0].num_batches_skipped.is_meta
