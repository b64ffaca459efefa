"""`upgrade`: what it keeps, what it fuses, and what it must not."""

import collections
import copy
import inspect
import io
import operator
import pickle
import random
from typing import Any, ClassVar, NamedTuple, cast

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from tests.passes.compare import near, same, unlike, upgraded

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


# --- the swap


@pytest.mark.parametrize(
    ("theirs", "ours", "shape"),
    [
        (nn.BatchNorm1d, bn.BatchNorm1d, (5, 3)),
        (nn.BatchNorm1d, bn.BatchNorm1d, (5, 3, 2)),
        (nn.BatchNorm2d, bn.BatchNorm2d, (5, 3, 2, 2)),
        (nn.BatchNorm3d, bn.BatchNorm3d, (5, 3, 2, 2, 1)),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.7, "eps": 0.3},
    ],
    ids=str,
)
def test_a_root_of_each_kind_becomes_ours(theirs, ours, shape, options):
    x = torch.randn(shape).double()
    model, report = upgraded(theirs(3, **options), x)
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
    assert outcome(report, "0") == ("swapped", "has hooks, which would see what is fused")

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


# --- what is left alone


class Subclass(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def parametrized():
    layer = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


def patched():
    layer = nn.BatchNorm2d(3)
    vars(layer)["forward"] = lambda x: x * 3
    return layer


def with_activation_of_its_own():
    layer = nn.BatchNorm2d(3)
    vars(layer)["activation"] = "mine"
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Subclass(3), "is Subclass of tests.passes.test_upgrade"),
        (parametrized, "parametrizations"),
        (patched, "its forward was replaced on the instance"),
        (with_activation_of_its_own, "has an attribute activation of its own"),
        (lambda: bn.BatchNorm2d(3, activation="relu"), "is ours already"),
    ],
)
def test_is_left_alone(make, why):
    layer = make()
    kind = type(layer)
    model, report = upgraded(nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.ReLU()), X)
    assert report["1"].outcome == "left alone" and why in report["1"].why
    assert model[1].__class__.__name__ == kind.__name__ and type(model[2]) is nn.ReLU


@pytest.mark.parametrize("layer", [nn.SyncBatchNorm(3), nn.LazyBatchNorm2d()], ids=["sync", "lazy"])
def test_another_class_of_torch_s_is_left_alone(layer):
    kind = type(layer)
    model, report = bn.upgrade(nn.Sequential(layer))
    assert report["0"].outcome == "left alone" and type(model[0]) is kind


def test_a_lazy_layer_is_swapped_once_it_knows_its_size():
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    model(X.float())
    assert bn.upgrade(model)[1].summary == "1 layer: 1 fused"


def test_a_layer_whose_weight_is_computed_is_left_alone():
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.BatchNorm2d(3))
    _, report = bn.upgrade(nn.Sequential(layer))
    assert "its weight is not a plain one" in report["0"].why and type(layer) is nn.BatchNorm2d


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_module_is_left_alone():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())), nn.BatchNorm2d(3))
    _, report = bn.upgrade(model)
    assert report["0.0"].outcome == "left alone" and "torch.jit" in report["0.0"].why
    assert report["1"].outcome == "swapped"


def test_torchvision_s_frozen_layer_is_left_alone():
    frozen = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(3)
    model, report = upgraded(nn.Sequential(frozen, nn.ReLU()), X)
    assert report["0"].outcome == "left alone" and type(model[1]) is nn.ReLU


def test_only_a_module_can_be_upgraded():
    with pytest.raises(TypeError, match=r"pass an instance, BatchNorm2d\(\.\.\.\)"):
        bn.upgrade(cast(Any, nn.BatchNorm2d))
    with pytest.raises(TypeError, match="not dict"):
        bn.upgrade(cast(Any, {}))


# --- in a Sequential


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
    model, report = upgraded(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), module), X)
    assert outcome(report, "1") == ("fused", activation)
    assert model[1].activation == activation and type(model[2]) is nn.Identity


def test_a_leaky_relu_of_another_slope_is_fused_as_a_module():
    model, report = upgraded(nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(0.2, inplace=True)), X)
    assert report["0"].what == "LeakyReLU(negative_slope=0.2)"
    assert model[0].activation.negative_slope == 0.2


class MyReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + 1


def hooked_relu():
    act = nn.ReLU()
    act.register_forward_hook(lambda module, args, y: y + 1)
    return act


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.GELU(), "GELU has no fused kernel"),
        (nn.Hardswish(), "Hardswish has no fused kernel"),
        (nn.Hardtanh(-1.0, 6.0), "Hardtanh has no fused kernel"),
        (nn.PReLU(), "PReLU has no fused kernel"),
        (MyReLU(), "no activation follows, but MyReLU"),
        (hooked_relu(), "ReLU, which follows, has hooks"),
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


class Unit(nn.Module):
    """A convolution and its layer, as many models have it; the activation is the caller's."""

    def __init__(self, act=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.inner = nn.ModuleDict({"norm": nn.BatchNorm2d(3)})
        self.act = act

    def forward(self, x):
        return self.inner["norm"](self.conv(x))


class Counting(Unit):
    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x + 1)


class Two(Unit):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("end", [lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), Unit])
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


@pytest.mark.parametrize(("end", "number"), [(Longer, 2), (Nested, 2)])
def test_a_module_in_which_more_is_fused_stays_whole(end, number):
    def forward(self, x):
        return F.relu(self.act(self.act(x)) + self.norm(x))

    _, report = upgraded(nn.Sequential(Block(forward, act=end())), X)
    assert outcome(report, "0.norm")[0] == "fused"
    assert outcome(report, f"0.act.{'first' if end is Longer else 'first.inner.norm'}") == ("fused", "silu")
    assert outcome(report, "0.act.inner.norm")[0] == "swapped"


def test_a_module_with_a_hook_stays_whole():
    def forward(self, x):
        return F.silu(self.norm(x)) + self.act(x)

    theirs = unlike(Block(forward, act=Unit()).double())
    theirs.act.register_forward_hook(lambda module, args, y: y * 2)
    ours, report = bn.upgrade(copy.deepcopy(theirs))
    assert outcome(report) == ("fused", "silu")
    same(ours, theirs, X)
    for model in (ours, theirs):
        model.act._forward_hooks.clear()
    same(ours, theirs, X)


def test_an_identity_with_a_hook_is_called():
    def forward(self, x):
        return F.relu(self.act(self.norm(x)))

    act = nn.Identity()
    act.register_forward_hook(lambda module, args, y: y * 2)
    keeps(forward, "Identity, which follows, has hooks", act=act)


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

    theirs = unlike(Block(forward, act=Scaling()).double())
    ours, report = bn.upgrade(copy.deepcopy(theirs))
    assert outcome(report, "act.inner.norm") == ("fused", "silu")
    for scale in (2.0, 3.0):
        ours.act.scale = theirs.act.scale = scale
        same(ours, theirs, X)


@pytest.mark.parametrize("end", [Counting, nn.Sequential], ids=["differs by mode", "has a hook"])
def test_a_layer_at_the_end_of_a_module_that_cannot_be_looked_into_is_not(end):
    model = nn.Sequential(end(Unit()) if end is nn.Sequential else end(), nn.Tanh())
    if end is nn.Sequential:
        model[0].register_forward_hook(lambda module, args, y: y * 2)
    _, report = upgraded(model, X)
    assert report.summary == "1 layer: 1 swapped"


class Doubled(nn.Sequential):
    def forward(self, x):
        for child in self:
            x = child(child(x))
        return x


def test_a_sequential_with_a_forward_of_its_own_is_traced():
    _, report = upgraded(Doubled(nn.BatchNorm2d(3), nn.Tanh()), X)
    assert outcome(report, "0") == ("swapped", "is called from 2 places")


# --- in a module's own forward


ACTIVATIONS = {
    "relu": [F.relu, torch.relu, lambda x: F.relu(x, inplace=True), lambda x: x.relu(), lambda x: x.relu_()],
    "relu6": [F.relu6, lambda x: F.relu6(x, True), lambda x: F.hardtanh(x, 0.0, 6.0)],
    "leaky_relu": [F.leaky_relu, lambda x: F.leaky_relu(x, 0.01, True)],
    "silu": [F.silu, lambda x: F.silu(x, inplace=True)],
    "sigmoid": [F.sigmoid, torch.sigmoid, lambda x: x.sigmoid()],
    "tanh": [F.tanh, torch.tanh, lambda x: x.tanh_()],
}


@pytest.mark.parametrize(
    ("what", "function"), [(name, each) for name, functions in ACTIVATIONS.items() for each in functions]
)
def test_an_activation_as_a_function_is_fused(what, function):
    fuses(lambda self, x: function(self.norm(self.conv(x))), what)
    fuses(lambda self, x: function(x + self.norm(self.conv(x))), f"residual, {what}")


@pytest.mark.parametrize("name", ["slope", "hardtanh"])
def test_an_activation_with_other_numbers_keeps_them(name):
    if name == "slope":
        fuses(lambda self, x: F.leaky_relu(self.norm(x), negative_slope=0.3), "LeakyReLU(negative_slope=0.3)")
    else:
        keeps(lambda self, x: F.hardtanh(self.norm(x), -0.5, 6.0), "hardtanh has no fused kernel")


def add_in_place(self, x):
    out = self.norm(self.conv(x))
    out += x
    return self.act(out)


def add_by_method(self, x):
    out = self.norm(self.conv(x))
    out.add_(x)
    out.relu_()
    return out


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.act(self.norm(self.conv(x)) + x),
        lambda self, x: self.act(x + self.norm(self.conv(x))),
        lambda self, x: self.act(torch.add(self.norm(self.conv(x)), self.shortcut(x))),
        lambda self, x: self.act(self.shortcut(x).add(self.norm(self.conv(x)))),
        lambda self, x: self.act(torch.add(self.norm(self.conv(x)), x, alpha=1)),
        add_in_place,
        add_by_method,
    ],
)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True)], ids=str)
def test_a_residual_is_fused(forward, act):
    model = fuses(forward, "residual, relu", act=act)
    names = [node.target for node in torch.fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    assert "act" not in names and names.count("norm") == 1


def grown(self, x):
    kept = self.norm(self.conv(x))
    out = F.relu(kept, inplace=True)
    return out + kept


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


def changed_and_read(self, x):
    out = self.norm(self.conv(x))
    early = out * 2
    out.relu_()
    return out + early


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda self, x: self.norm(self.conv(x)), "no activation follows"),
        (lambda self, x: self.act(self.norm(x)) + F.relu(self.norm(x)), "is called from 2 places"),
        (lambda self, x: (y := self.norm(x)) + self.act(y), "its output is used 2 times"),
        (lambda self, x: (y := self.norm(x), self.act(y))[::-1], "its output is used 2 times"),
        (lambda self, x: self.act((y := self.norm(x)) + y), "no activation follows, but add"),
        (lambda self, x: self.act(torch.add(self.norm(x), x, alpha=2)), "no activation follows, but add"),
        (lambda self, x: self.act(torch.add(x, self.norm(x), alpha=0.5)), "no activation follows, but add"),
        (lambda self, x: self.act(self.norm(x) + 1), "no activation follows, but add"),
        (lambda self, x: self.act(self.norm(x) + x + x), "no activation follows, but add"),
        (lambda self, x: self.act(self.norm(x) - x), "no activation follows, but sub"),
        (lambda self, x: F.gelu(self.norm(x)), "gelu has no fused kernel"),
        (lambda self, x: self.norm(input=x).relu(), "is not called with its input alone"),
        (grown, "its output is used 2 times"),
        (changed_and_read, "its output is used 2 times"),
        (lambda self, x: self.act(self.norm(x)) if x.sum() > 0 else x, "depends on values"),
    ],
)
def test_in_a_forward_what_is_not_the_pattern_is_not_fused(forward, why):
    keeps(forward, why)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (changed_input, "its input may be changed in place"),
        (changed_view, "its input may be changed in place"),
        (changed_under_a_view, "its input may be changed in place"),
        (changed_argument, "it reads a value again that iadd has changed"),
    ],
)
def test_what_is_changed_in_place_is_read_when_it_was(forward, why):
    keeps(forward, why, gradients=False)


def test_an_activation_that_changes_the_layer_s_input_keeps_its_place():
    keeps(changed_by_a_module, "its input may be changed in place", False, act=nn.ReLU(inplace=True))


def test_the_argument_of_a_forward_is_changed_in_place_as_before():
    def forward(self, x):
        x += self.norm(self.conv(x))
        return self.act(x)

    model = keeps(forward, "no activation follows, but iadd", False)
    x = X.clone()
    assert model.eval()(x) is not None and not torch.equal(x, X)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 3, 6, 6), None),
        ((3, 1, 1), None),
        ((1,), None),
        ((4, 3, 6, 6), torch.float32),
        ((2, 1, 3, 6, 6), None),
    ],
)
def test_a_residual_of_another_shape_or_dtype_gives_what_it_gave(shape, dtype):
    class Two(Block):
        def forward(self, x, r):  # type: ignore[override]
            return torch.tanh(self.norm(self.conv(x)) + r)

    shape = (2, 4, 3, 6, 6) if len(shape) == 5 else shape
    _, report = upgraded(Two(), X, torch.randn(shape, dtype=dtype or torch.float64))
    assert outcome(report) == ("fused", "residual, tanh")


def test_a_residual_that_is_wider_widens_the_output():
    class Two(Block):
        def forward(self, x, r):  # type: ignore[override]
            return F.relu(r + self.norm(x))

    model = unlike(Two())
    ours, _ = bn.upgrade(copy.deepcopy(model))
    x, r = torch.randn(2, 4, 3, 2, 2).float()[0], torch.randn(4, 3, 2, 2).double()
    assert ours(x, r).dtype == model(x, r).dtype == torch.float64
    assert isinstance(ours(x, 2.0), torch.Tensor)


class Deep(nn.Module):
    """As a user writes a residual block: what is added to is a Sequential's output."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
            nn.SiLU(),
            nn.Dropout(0.5),
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5), nn.BatchNorm2d(3))

    def forward(self, x):
        return F.silu(self.body(x) + self.shortcut(x))


def test_a_layer_at_the_end_of_a_sequential_is_fused_with_what_follows_that():
    _, report = upgraded(nn.Sequential(Deep(), Deep()), X)
    assert report.summary == "6 layers: 4 fused, 2 swapped"
    assert outcome(report, "0.body.4.1") == ("fused", "residual, silu")
    assert outcome(report, "0.shortcut.2") == ("swapped", "is the residual of another layer")


def test_a_sequential_with_a_hook_is_called_as_a_whole():
    model = Deep()
    model.body.register_forward_hook(lambda module, args, y: y * 2)
    _, report = upgraded(model, X)
    assert report["body.4.1"].outcome == "swapped"


def test_a_sequential_that_two_blocks_share_is_not_looked_into():
    one, other = Deep(), Deep()
    other.body = one.body
    _, report = upgraded(nn.Sequential(one, other), X)
    assert outcome(report, "0.body.4.1") == ("swapped", "is called from 2 places")
    assert outcome(report, "0.body.1") == ("fused", "silu")


def test_what_training_decides_is_decided_at_each_call():
    def forward(self, x):
        out = self.norm(self.conv(x))
        return F.dropout(self.act(out), 0.5, self.training) if self.training else self.act(out) * 3

    fuses(forward)
    keeps(
        lambda self, x: self.act(self.norm(x)) if self.training else torch.tanh(self.norm(x)),
        "differs between",
    )
    keeps(lambda self, x: self.act(self.norm(x)) if self.training else self.norm(x), "no activation follows")


def test_dropout_draws_the_same_numbers():
    fuses(lambda self, x: F.dropout(self.act(self.norm(F.dropout(x)) + F.dropout(x)), 0.3), "residual, relu")


# --- forwards that a graph would not hold


def test_random_numbers_of_python_are_not_frozen():
    why = "it draws random numbers in Python"
    for draw in (random.random, numpy.random.rand):
        states = random.getstate(), str(numpy.random.get_state())
        _, report = bn.upgrade(Block(lambda self, x, draw=draw: self.act(self.norm(x)) * draw()))
        assert why in report["norm"].why
        assert (random.getstate(), str(numpy.random.get_state())) == states


def test_tensors_that_do_not_come_from_the_input_are_not_frozen():
    for forward in (
        lambda self, x: self.act(self.norm(x)) * torch.rand(1),
        lambda self, x: self.act(self.norm(x)) if torch.rand(()) < 0.5 else x,
    ):
        model, state = Block(forward), torch.get_rng_state()
        _, report = bn.upgrade(model)
        assert "it computes rand" in report["norm"].why
        assert torch.equal(torch.get_rng_state(), state)


def count(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return self.act(self.norm(x))


def collect(self, x):
    self.seen.append(x)
    return self.act(self.norm(x))


def test_a_forward_that_changes_its_module_goes_on_to():
    model = keeps(count, "it changes calls")
    assert model.calls == 3
    model = Block(collect)
    vars(model)["seen"] = []
    _, report = bn.upgrade(model)
    assert "it changes seen" in report["norm"].why and model.seen == []


def test_gradients_that_are_switched_off_stay_off():
    def forward(self, x):
        with torch.no_grad():
            x = self.conv(x)
        return self.act(self.norm(x))

    keeps(forward, "it switches gradients off")


def test_autocast_that_is_switched_stays_so():
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.act(self.norm(x))

    keeps(forward, "it switches autocast")


def test_checkpointing_goes_on():
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(lambda x: self.act(self.norm(x)), x, use_reentrant=False)

    _, report = bn.upgrade(
        Block(forward)
    )  # torch's layer counts a batch twice here, so there is nothing to compare
    assert "it uses activation checkpointing" in report["norm"].why


def test_a_value_that_is_given_other_data_is():
    def forward(self, x):
        out = self.conv(x)
        out.data = out.data * 2
        return self.act(self.norm(out))

    keeps(forward, "it sets data of a value", gradients=False)


def test_a_class_that_keeps_a_list_of_its_subclasses_gets_one_more_at_most():
    class Registered(Block):
        subclasses: ClassVar[list[type]] = []

        def __init_subclass__(cls):
            cls.subclasses.append(cls)

    _, report = upgraded(Registered(lambda self, x: self.act(self.norm(x))), X)
    assert outcome(report) == ("fused", "relu")
    assert len(Registered.subclasses) == 1


def test_a_buffer_is_read_at_each_call():
    def forward(self, x):
        self.calls.add_(1)
        return self.act(self.norm(x)) * self.calls

    model = Block(forward)
    model.register_buffer("calls", torch.zeros(()))
    _, report = upgraded(model, X)
    assert outcome(report) == ("fused", "relu")


# --- arguments


class Optional(Block):
    def forward(self, x, scale=None, *, shift=0.0):
        out = torch.tanh(self.norm(self.conv(x)))
        if scale is not None:
            out = out * scale
        return out + shift


@pytest.mark.parametrize(
    ("args", "kwargs", "fused"),
    [
        ((X,), {}, True),
        ((), {"x": X}, True),
        ((X, None), {}, True),
        ((X, X), {}, False),
        ((X,), {"scale": X}, False),
        ((X,), {"shift": 2.0}, False),
    ],
)
def test_a_call_that_was_not_foreseen_runs_the_old_forward(args, kwargs, fused):
    theirs = unlike(Optional().double())
    ours, report = bn.upgrade(copy.deepcopy(theirs))
    assert outcome(report) == ("fused", "tanh")
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    for _ in range(2):
        near(ours(*args, **kwargs), theirs(*args, **kwargs))
        assert (ours.norm.activation == "tanh") == fused
    same(ours, theirs, X)


def test_arguments_that_all_callers_give_are_traced():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Optional()

        def forward(self, x):
            return self.block(x, scale=x)

    model, report = upgraded(Parent(), X)
    assert outcome(report, "block.norm") == ("fused", "tanh") and model.block.norm.activation == "tanh"


def test_a_wrong_call_is_the_error_it_was():
    for args, kwargs in (((), {}), ((X,), {"nothing": 1}), ((X,), {"x": X}), ((X, X, X), {})):
        model, _ = bn.upgrade(Optional())
        with pytest.raises(TypeError, match="argument"):
            model(*args, **kwargs)


@pytest.mark.parametrize("ask", [lambda x: isinstance(x, torch.Tensor), torch.is_tensor])
def test_a_forward_that_asks_for_the_type_of_its_input_is_answered(ask):
    def forward(self, x):
        x = x if ask(x) else torch.cat(x)
        return self.act(self.norm(x))

    model = fuses(forward)
    theirs = copy.deepcopy(model)
    near(model.eval()([X, X]), theirs.eval()(torch.cat([X, X])))
    assert model.norm.activation is None  # it was not traced for that


def test_a_forward_that_asks_for_the_type_of_another_value_is_not_traced():
    keeps(
        lambda self, x: self.act(self.norm(x)) if isinstance(self.conv(x), torch.Tensor) else x,
        "asks for the type",
    )


@pytest.mark.parametrize("change", ["attribute", "child", "layer", "activation"])
def test_what_a_forward_has_read_may_change_afterwards(change):
    class Model(Block):
        def __init__(self):
            super().__init__()
            self.times = 2

        def forward(self, x):
            out = F.silu(self.norm(self.conv(x))) * self.times
            return out if self.shortcut is None else out + self.shortcut(x)

    theirs = unlike(Model().double())
    ours, report = bn.upgrade(copy.deepcopy(theirs))
    assert outcome(report) == ("fused", "silu")
    same(ours, theirs, X)
    for model in (ours, theirs):
        if change == "attribute":
            model.times = 3
        elif change == "child":
            model.shortcut = None
        elif change == "layer":
            model.norm = nn.SyncBatchNorm.convert_sync_batchnorm(model.norm).eval()
        else:
            model.norm.activation = None
        model.eval()
    near(ours(X), theirs(X))
    assert type(ours) is Model


# --- calls from elsewhere


class Parent(nn.Module):
    def __init__(self, forward, *more):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU(), *more)
        self.other = nn.Conv2d(3, 3, 1)
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
        self.features = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU())
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU()) for _ in range(2)]
        )
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
    assert "may call it in a way of its own: the forward of" in report["features.1"].why


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


# --- an upgraded model is a model


def test_the_block_keeps_its_name_and_is_still_of_its_class():
    model, _ = bn.upgrade(Deep())
    assert isinstance(model, Deep)
    assert (type(model).__name__, type(model).__module__) == ("Deep", __name__)
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


@pytest.mark.parametrize("change", [copied, pickled, saved, fx_traced, replicated, copy.copy])
def test_it_survives(change):
    torch.manual_seed(0)
    theirs = unlike(Net().double())
    ours, report = bn.upgrade(copy.deepcopy(theirs))
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


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_as_one_graph(training):
    theirs = unlike(Net().double())
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours, _ = bn.upgrade(copy.deepcopy(theirs))
    compiled = cast(Any, torch.compile(ours, backend="aot_eager", fullgraph=True))
    for _ in range(2):
        near(compiled.train(training)(X), theirs.train(training)(X))


def test_what_was_compiled_before_is_compiled_again():
    theirs = unlike(Net().double()).eval()
    ours = copy.deepcopy(theirs)
    compiled = cast(Any, torch.compile(ours, backend="eager"))
    compiled(X)
    _, report = bn.upgrade(compiled)
    assert report.summary == "8 layers: 6 fused, 2 swapped"
    near(compiled(X), theirs(X))


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
    theirs = unlike(Net().double())
    theirs.blocks[0].register_forward_hook(lambda module, args, y: y * 2)
    theirs.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    ours, report = bn.upgrade(copy.deepcopy(theirs))
    assert report["blocks.0.body.4.1"].outcome == "fused"
    same(ours, theirs, X)


def test_frozen_layers_stay_frozen():
    theirs = unlike(Net().double())
    theirs.norm.eval()
    theirs.norm.weight.requires_grad_(False)
    ours, _ = bn.upgrade(copy.deepcopy(theirs))
    assert not ours.norm.training and ours.blocks.training
    assert not ours.norm.weight.requires_grad


def test_in_float32_too():
    _, report = upgraded(Net(), X.float(), tolerance=2e-4)
    assert report.summary == "8 layers: 6 fused, 2 swapped"


# --- timm


def test_timm_s_layer_with_an_activation_is_understood():
    layer = pytest.importorskip("timm.layers").BatchNormAct2d
    for act, activation in ((nn.ReLU, "relu"), (nn.SiLU, "silu"), (nn.Identity, None)):
        model, report = upgraded(nn.Sequential(nn.Conv2d(3, 3, 1), layer(3, act_layer=act)), X)
        assert model[1].activation == activation
        assert outcome(report, "1") == (
            ("fused", activation) if activation else ("swapped", "no activation follows")
        )
        assert type(model[1]) is bn.BatchNorm2d
        assert isinstance(model[1].act, act) and isinstance(model[1].drop, nn.Identity)
    for other in (nn.PReLU, nn.Hardswish):
        model, report = upgraded(nn.Sequential(layer(3, act_layer=other, inplace=False)), X)
        assert model[0].activation is model[0].act
        assert outcome(report, "0") == ("swapped", f"{other.__name__} has no fused kernel")


def test_timm_s_layer_that_drops_is_left_alone():
    layer = pytest.importorskip("timm.layers").BatchNormAct2d
    _model, report = bn.upgrade(layer(3, drop_layer=nn.Dropout))
    assert report[""].outcome == "left alone" and "drops between" in report[""].why
