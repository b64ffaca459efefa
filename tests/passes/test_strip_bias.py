"""A bias before BN goes, and what the model computes stays, in both modes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from tests.mutations.mutation import Mutation
from tests.passes.test_fold import NORM, Odd, conv, hooked, tied


class Rectified(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input.relu())


def keep(m, y):
    m.kept = y.detach()
    return y


X = torch.randn(4, 6, 8, 8, dtype=torch.float64)
# which biases go, the forward, the children
CASES = {
    "conv": (["a"], lambda m, x: m.bn(m.a(x)), {"a": conv(), **NORM}),
    "transposed": (["a"], lambda m, x: m.bn(m.a(x)), {"a": nn.ConvTranspose2d(6, 6, 3), **NORM}),
    "linear": (["a"], lambda m, x: m.bn(m.a(x.flatten(1))), {"a": nn.Linear(384, 5), "bn": nn.BatchNorm1d(5)}),
    "concat": (
        ["a", "b"], lambda m, x: m.bn(torch.cat([m.b(x), m.a(x)], 1)),
        {"a": conv(), "b": conv(), "bn": nn.BatchNorm2d(12)},
    ),
    "a difference": (["a", "b"], lambda m, x: m.bn(m.a(x) - m.b(x)), {"a": conv(), "b": conv(), **NORM}),
    "called twice": (["a"], lambda m, x: m.bn(m.a(m.bn(m.a(x)))), {"a": conv(), **NORM}),
    "dropout between": ([], lambda m, x: m.bn(m.drop(m.a(x))), {"a": conv(), "drop": nn.Dropout(), **NORM}),
    "relu between": ([], lambda m, x: m.bn(m.a(x).relu()), {"a": conv(), **NORM}),
    "read twice": ([], lambda m, x: m.bn(y := m.a(x)) + y, {"a": conv(), **NORM}),
    "conv called elsewhere": ([], lambda m, x: m.bn(m.a(x)) + m.a(x), {"a": conv(), **NORM}),
    "bias of two": ([], lambda m, x: m.bn(m.a(x)) + m.b(x), {**tied(), **NORM}),
    "no bias": ([], lambda m, x: m.bn(m.a(x)), {"a": conv(False), **NORM}),
    "no statistics": (
        ["a"], lambda m, x: m.bn(m.a(x)), {"a": conv(), "bn": nn.BatchNorm2d(6, track_running_stats=False)},
    ),
    "half of its channels": (
        [], lambda m, x: m.bn((p := m.a(x).chunk(2, 1))[0]) * p[1].sigmoid(), {"a": conv(), "bn": nn.BatchNorm2d(3)},
    ),
    "half of the batch": ([], lambda m, x: m.bn((p := m.a(x).chunk(2))[0]) * p[1].sigmoid(), {"a": conv(), **NORM}),
    "a half of the image each": (
        [], lambda m, x: m.bn((p := m.a(x).chunk(2, 2))[0]) * p[1].sigmoid(), {"a": conv(), **NORM},
    ),
    "a forward of its own": ([], lambda m, x: m.bn(m.a(x)), {"a": conv(), "bn": Rectified(6)}),
    "returned in evaluation": (
        [], lambda m, x: m.bn(y := m.a(x)) + (0 if m.training else y), {"a": conv(), **NORM},
    ),
    "its running mean elsewhere": (
        [], lambda m, x: m.bn(m.a(x)) + m.bn.running_mean[:, None, None], {"a": conv(), **NORM},
    ),
    "kept in an attribute": ([], lambda m, x: m.bn(keep(m, m.a(x))), {"a": conv(), **NORM}),
    "a hook between": ([], lambda m, x: m.bn(m.i(m.a(x))), {"a": conv(), "i": hooked(nn.Identity()), **NORM}),
    "a hook": ([], lambda m, x: m.bn(m.a(x)), {"a": hooked(conv()), **NORM}),
    "a hook on the bn": ([], lambda m, x: m.bn(m.a(x)), {"a": conv(), "bn": hooked(nn.BatchNorm2d(6))}),
    "ours": (["a"], lambda m, x: m.bn(m.a(x)), {"a": conv(), "bn": bn.BatchNorm2d(6, activation="relu")}),
    "ours, debiased": ([], lambda m, x: m.bn(m.a(x)), {"a": conv(), "bn": bn.BatchNorm2d(6, debiased=True)}),
    "Sync": (["a"], lambda m, x: m.bn(m.a(x)), {"a": conv(), "bn": bn.BatchNorm2d(6, statistics=bn.Sync())}),
    "a functional conv": (
        [], lambda m, x: m.bn(F.conv2d(x, m.a.weight, m.a.bias)) + m.a(x)[..., 1:-1, 1:-1], {"a": conv(), **NORM},
    ),
}  # fmt: skip
CASES["bias of two"][2]["b"].bias = CASES["bias of two"][2]["a"].bias


def trained(model):
    """In float64, after steps on data: with running statistics that are none of a new model."""
    model = model.double().train()
    for _ in range(3):
        model(torch.randn_like(X) * 2 + 1)
    return model


@pytest.mark.parametrize("case", CASES)
def test_it_computes_the_same_in_both_modes(case):
    gone, forward, children = CASES[case]
    model = trained(Odd(forward, **copy.deepcopy(children)))
    before = copy.deepcopy(model)
    same, report = bn.strip_bias(model, X)
    assert same is model and all(module.training for module in model.modules())
    missing = before.state_dict().keys() - model.state_dict().keys()
    assert missing == {f"{path}.bias" for path in gone}, report
    assert report.count("stripped") == bool(gone)
    assert all(layer.why for layer in report.layers if layer.outcome == "left alone")
    torch.testing.assert_close(model.eval()(X), before.eval()(X), rtol=1e-12, atol=1e-12)
    for each in (model.train(), before.train()):
        torch.manual_seed(2)
        each.result = each(X)
    torch.testing.assert_close(model.result, before.result, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.eval()(X), before.eval()(X), rtol=1e-11, atol=1e-11)  # and goes on so


def test_without_inputs_it_is_traced():
    first, apart, last = conv(), conv(), conv()
    block = nn.Sequential(first, nn.Identity(), nn.BatchNorm2d(6), nn.ReLU())
    model = trained(nn.Sequential(block, nn.Sequential(apart, nn.ReLU(), nn.BatchNorm2d(6)), last))
    before = copy.deepcopy(model).eval()
    _, report = bn.strip_bias(model)
    assert report["0.2"].what == "0.0"
    assert report["1.2"].outcome == "left alone"
    assert first.bias is None and apart.bias is not None and last.bias is not None
    torch.testing.assert_close(model.eval()(X), before(X), rtol=1e-12, atol=1e-12)


def test_without_inputs_nobody_knows_the_channels_of_a_linear_layer():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(10), conv(), nn.BatchNorm2d(5))
    before = copy.deepcopy(model.state_dict())
    _, report = bn.strip_bias(model)
    assert report.count("left alone") == 2 and "pass inputs" in report["1"].why
    assert "has 5 channels, and 2 makes 6" in report["3"].why
    assert model.state_dict().keys() == before.keys()


def test_what_cannot_be_traced_asks_for_inputs():
    model = Odd(lambda m, x: m.bn(m.a(x)) if x.sum() > 0 else x, a=conv(), bn=nn.BatchNorm2d(6))
    with pytest.raises(ValueError, match=r"pass inputs, strip_bias\(model, images\)"):
        bn.strip_bias(model)
    assert model.get_parameter("a.bias").shape == (6,)


def test_the_statistics_of_every_domain_are_moved():
    model = trained(Odd(lambda m, x: m.bn(m.a(x)), a=conv(), bn=bn.BatchNorm2d(6)))
    with bn.domain("night"):
        model(3 * X)
    before = copy.deepcopy(model).eval()
    bn.strip_bias(model, X)
    model.eval()
    with bn.domain("night"):
        torch.testing.assert_close(model(X), before(X), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(X), before(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inputs", [True, False])
def test_a_real_network_with_biases(inputs):
    models = pytest.importorskip("torchvision.models")
    model = models.vgg11_bn(weights=None, num_classes=10, init_weights=False).features.double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model.train()(x)
    before = copy.deepcopy(model).eval()
    _, report = bn.strip_bias(model, *[x] * inputs)
    assert report.summary == "8 layers: 8 stripped"
    torch.testing.assert_close(model.eval()(x), before(x), rtol=1e-10, atol=1e-10)


MUTATIONS = [
    Mutation(
        "the running mean stays", "passes/strip_bias.py",
        "            mean.copy_(new)", "            pass",
        "evaluation would subtract a bias that is no more",
    ),
    Mutation(
        "other readers of a bias", "passes/strip_bias.py",
        "                if not readers.issuperset(bias.users):", "                if False:",
        "the convolution's other call would lose its bias",
    ),
]  # fmt: skip
