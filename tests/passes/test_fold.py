"""Folding into what comes before: odd models, each held against itself in float64, and real networks."""

import copy
import ctypes

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import batchnorm as bn
from batchnorm.graph.observation import BATCH_NORM, observe
from batchnorm.passes.fold import fold
from tests.mutations.mutation import Mutation


def with_statistics(model):
    """The model in float64, with statistics and parameters that are none of a new one."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                nn.init.normal_(module.running_mean, 0, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1)
                nn.init.normal_(module.bias, 0, 0.3)
    return model.double().eval()


class Odd(nn.Module):
    def __init__(self, forward, **children):
        super().__init__()
        self.own_forward = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.own_forward(self, x)


def conv(bias=True, **options):
    return nn.Conv2d(6, 6, 3, padding=1, bias=bias, **options)


def hooked(module):
    module.register_forward_hook(lambda _, __, y: 3 * y)
    return module


def observed(module):
    module.register_forward_hook(lambda *_: None)
    return module


def tied():
    a, b = conv(), conv()
    b.weight = a.weight
    return {"a": a, "b": b, "bn": nn.BatchNorm2d(6)}


def as_rows(m, x):
    return m.bn(m.linear(x.flatten(1, 3)))


def padless(bias=True, **options):
    return nn.Conv2d(6, 6, 3, bias=bias, **options)


NORM = {"bn": nn.BatchNorm2d(6)}
# what, how many of its layers are folded, and the forward with its children
PROBES = {
    "conv, bn": (1, lambda m, x: m.bn(m.a(x)), {"a": conv(), **NORM}),
    "conv without bias": (1, lambda m, x: m.bn(m.a(x)), {"a": conv(False), **NORM}),
    "two convs, a bn each, one weight": (
        0, lambda m, x: m.bn(m.a(x)) + m.c(m.a(x)), {"a": conv(), "c": nn.BatchNorm2d(6), **NORM},
    ),
    "conv and bn called twice": (1, lambda m, x: m.bn(m.a(m.bn(m.a(x)))), {"a": conv(), **NORM}),
    "conv called twice, bn after one": (0, lambda m, x: m.bn(m.a(x)) + m.a(x), {"a": conv(), **NORM}),
    "bn after two convs": (1, lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), {"a": conv(), "b": conv(), **NORM}),
    "tied weights": (0, lambda m, x: m.bn(m.a(x)) + m.b(x), tied()),
    "conv's output read twice": (0, lambda m, x: m.bn(y := m.a(x)) + y, {"a": conv(), **NORM}),
    "linear": (1, as_rows, {"linear": nn.Linear(384, 5), "bn": nn.BatchNorm1d(5)}),
    "linear on (N, L, C), C = L": (
        0, lambda m, x: m.bn(m.linear(x.flatten(2)[..., :6])), {"linear": nn.Linear(6, 6), "bn": nn.BatchNorm1d(6)},
    ),
    "linear on (N, L, C), turned": (
        1, lambda m, x: m.bn(m.linear(x.flatten(2).mT).mT), {"linear": nn.Linear(6, 4), "bn": nn.BatchNorm1d(4)},
    ),
    "no affine": (1, lambda m, x: m.bn(m.a(x)), {"a": conv(), "bn": nn.BatchNorm2d(6, affine=False)}),
    "no running statistics": (
        0, lambda m, x: m.bn(m.a(x)), {"a": conv(), "bn": nn.BatchNorm2d(6, track_running_stats=False)},
    ),
    "transposed": (1, lambda m, x: m.bn(m.a(x)), {"a": nn.ConvTranspose2d(6, 6, 3), **NORM}),
    "transposed, in groups": (
        1, lambda m, x: m.bn(m.a(x)), {"a": nn.ConvTranspose2d(6, 6, 3, groups=2, bias=False), **NORM},
    ),
    "in groups": (1, lambda m, x: m.bn(m.a(x)), {"a": conv(groups=3), **NORM}),
    "depthwise": (1, lambda m, x: m.bn(m.a(x)), {"a": conv(groups=6), **NORM}),
    "a hook that changes the conv's output": (0, lambda m, x: m.bn(m.a(x)), {"a": hooked(conv()), **NORM}),
    "a hook that looks at it": (0, lambda m, x: m.bn(m.a(x)), {"a": observed(conv()), **NORM}),
    "a hook on the bn": (0, lambda m, x: m.bn(m.a(x)), {"a": conv(), "bn": hooked(nn.BatchNorm2d(6))}),
    "dropout between": (1, lambda m, x: m.bn(m.drop(m.a(x))), {"a": conv(), "drop": nn.Dropout(), **NORM}),
    "by name": (1, lambda m, x: m.bn(input=m.a(x)), {"a": conv(), **NORM}),
    "weight_norm": (1, lambda m, x: m.bn(m.a(x)), {"a": weight_norm(conv()), **NORM}),
    "SyncBatchNorm": (1, lambda m, x: m.bn(m.a(x)), {"a": conv(), "bn": nn.SyncBatchNorm(6)}),
    "control flow": (1, lambda m, x: m.bn(m.a(x)) if x.size(0) else x, {"a": conv(), **NORM}),
    "bn after bn": (2, lambda m, x: m.c(m.bn(m.a(x))), {"a": conv(), "c": nn.BatchNorm2d(6), **NORM}),
    "a concatenation": (
        1, lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1)), {"a": conv(), "b": conv(False), "bn": nn.BatchNorm2d(12)},
    ),
    "a difference": (1, lambda m, x: m.bn(m.a(x) - m.b(x)), {"a": conv(False), "b": conv(), **NORM}),
    "a number is added": (1, lambda m, x: m.bn(m.a(x) + 1), {"a": conv(), **NORM}),
    "subtracted, in place": (1, lambda m, x: m.bn(m.a(x).sub_(m.b(x))), {"a": conv(False), "b": conv(False), **NORM}),
    "half of a convolution": (
        1, lambda m, x: m.bn(torch.add(m.a(x), m.b(x), alpha=0.5)), {"a": conv(), "b": conv(), **NORM},
    ),
    "an embedding of positions": (
        1, lambda m, x: m.bn(m.a(x) + m.positions),
        {"a": conv(False), "positions": nn.Parameter(torch.randn(6, 8, 8)), **NORM},
    ),
    "a functional convolution without bias": (
        0, lambda m, x: m.bn(F.conv2d(x, m.a.weight)), {"a": conv(), **NORM},
    ),
    "a part of its channels": (1, lambda m, x: m.bn(m.a(x)[:, :3]), {"a": conv(), "bn": nn.BatchNorm2d(3)}),
    "a part, and the other one elsewhere": (
        1, lambda m, x: m.bn((p := m.a(x).chunk(2, 1))[0]) * p[1].sigmoid(), {"a": conv(), "bn": nn.BatchNorm2d(3)},
    ),
    "both parts, a bn each": (
        2, lambda m, x: m.bn((p := m.a(x).chunk(2, 1))[0]) * m.c(p[1]),
        {"a": conv(), "bn": nn.BatchNorm2d(3), "c": nn.BatchNorm2d(3)},
    ),
    "pooled": (1, lambda m, x: m.bn(F.adaptive_avg_pool2d(m.a(x), 1)), {"a": conv(), **NORM}),
    "relu between": (0, lambda m, x: m.bn(m.a(x).relu()), {"a": conv(), **NORM}),
    "the model returns what is between": (0, lambda m, x: (m.bn(y := m.a(x)), y), {"a": conv(), **NORM}),
    "bn, conv": (1, lambda m, x: m.a(m.bn(x)) + x[..., 2:, 2:], {"a": padless(), **NORM}),
    "bn, conv without bias": (1, lambda m, x: m.a(m.bn(x)), {"a": padless(False, groups=2), **NORM}),
    "bn, two convs": (1, lambda m, x: m.a(y := m.bn(x)) * m.b(y), {"a": padless(), "b": padless(stride=1), **NORM}),
    "bn, conv that pads": (0, lambda m, x: m.a(m.bn(x)), {"a": conv(), **NORM}),
    "bn, transposed conv": (0, lambda m, x: m.a(m.bn(x)), {"a": nn.ConvTranspose2d(6, 6, 3), **NORM}),
    "bn, a conv and more": (0, lambda m, x: m.a(y := m.bn(x)).mean() + y, {"a": padless(), **NORM}),
    "bn, conv, returned": (0, lambda m, x: (m.a(y := m.bn(x)), y), {"a": padless(), **NORM}),
    "bn, linear": (1, lambda m, x: m.a(m.bn(x.flatten(2).sum(2))), {"a": nn.Linear(6, 4), "bn": nn.BatchNorm1d(6)}),
    "bn, pool, flat, linear": (
        1, lambda m, x: m.a(F.avg_pool2d(m.bn(x.relu()), 4).flatten(1)), {"a": nn.Linear(24, 4, bias=False), **NORM},
    ),
    "bn, a pool that pads, linear": (
        0, lambda m, x: m.a(F.avg_pool2d(m.bn(x.relu()), 3, 3, 1).flatten(1)), {"a": nn.Linear(54, 4), **NORM},
    ),
    "bn, concat, conv": (
        1, lambda m, x: m.a(torch.cat([x.relu(), m.bn(x)], 1)), {"a": nn.Conv2d(12, 4, 3, groups=2), **NORM},
    ),
    "bn, relu, conv": (0, lambda m, x: m.a(m.bn(x).relu()), {"a": padless(), **NORM}),
    "bn in a conv's weight": (0, lambda m, x: F.conv2d(x, m.bn(x)[:, :, :3, :3]), {**NORM}),
    "a factor of each channel": (
        1, lambda m, x: m.bn(m.a(x) * m.gamma[:, None, None]),
        {"a": conv(), "gamma": nn.Parameter(torch.rand(6)), **NORM},
    ),
    "a factor of each position": (
        0, lambda m, x: m.bn(m.a(x) * m.gamma), {"a": conv(), "gamma": nn.Parameter(torch.rand(6, 8, 8)), **NORM},
    ),
    "a factor that is 0": (
        0, lambda m, x: m.bn(m.a(x) * m.gamma), {"a": conv(), "gamma": nn.Parameter(torch.zeros(6, 1, 1)), **NORM},
    ),
    "numbers": (1, lambda m, x: m.bn(3 - m.a(x) / 2 * 5), {"a": conv(False), **NORM}),
    "a gate": (0, lambda m, x: m.bn(m.a(x) * x.mean((2, 3), keepdim=True).sigmoid()), {"a": conv(), **NORM}),
    "a skip": (1, lambda m, x: m.bn(m.a(x) + x), {"a": conv(groups=6), **NORM}),
    "a skip past two": (1, lambda m, x: m.bn(m.a(x) - m.b(x) - 2 * x), {"a": conv(False), "b": conv(), **NORM}),
    "a skip past no tap at its own position": (
        0, lambda m, x: m.bn(m.a(x)[:, :, 2:, 2:] + x), {"a": nn.Conv2d(6, 6, 3, padding=2), **NORM},
    ),
    "beside, with other positions": (
        0, lambda m, x: m.a(x)[:, :, 2:, 2:] + m.bn(x), {"a": nn.Conv2d(6, 6, 3, padding=2), **NORM},
    ),
    "turned round beside": (0, lambda m, x: m.a(x).transpose(2, 3) + m.bn(x), {"a": conv(), **NORM}),
    "two convolutions, positions apart": (
        2, lambda m, x: m.bn(m.a(x)) + m.c(m.b(x)).transpose(2, 3),
        {"a": conv(), "b": nn.Conv2d(6, 6, 1), "c": nn.BatchNorm2d(6), **NORM},
    ),
    "a skip of something else": (0, lambda m, x: m.bn(m.a(x) + x.relu()), {"a": conv(), **NORM}),
    "RepVGG": (
        3, lambda m, x: (m.bn(x) + m.c(m.a(x)) + m.d(m.b(x))).relu(),
        {"a": conv(False), "b": nn.Conv2d(6, 6, 1), "c": nn.BatchNorm2d(6), "d": nn.BatchNorm2d(6), **NORM},
    ),
    "subtracted from a conv of the same": (1, lambda m, x: m.a(x) - m.bn(x), {"a": conv(groups=2), **NORM}),
    "beside a linear layer": (
        1, lambda m, x: m.a(y := x[:, :, 0, 0]) + m.bn(y), {"a": nn.Linear(6, 6), "bn": nn.BatchNorm1d(6)},
    ),
    "bn, relu, bn": (0, lambda m, x: m.c(m.bn(x).relu()), {"c": nn.BatchNorm2d(6), **NORM}),
    "bn, bn": (1, lambda m, x: m.c(m.bn(x.relu())).relu(), {"c": nn.BatchNorm2d(6), **NORM}),
    "InstanceNorm with statistics": (
        1, lambda m, x: m.bn(m.a(x)), {"a": conv(), "bn": nn.InstanceNorm2d(6, track_running_stats=True, affine=True)},
    ),
}  # fmt: skip


def outputs(model, x):
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("what", PROBES)
def test_it_computes_the_same_and_the_model_stays(what):
    number, forward, children = PROBES[what]
    model = with_statistics(Odd(forward, **copy.deepcopy(children)))
    state = {name: values.clone() for name, values in model.state_dict().items()}
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    folded, report = fold(model, x)
    for one, two in zip(outputs(folded, x), outputs(model, x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    other = torch.randn(3, 6, 8, 8, dtype=torch.float64)  # nothing was made for these values alone
    for one, two in zip(outputs(folded, other), outputs(model, other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert report.count("folded") == number, report
    assert all(layer.why for layer in report.layers if layer.outcome == "left alone")
    left = [operation for operation in observe(folded, x).operations if operation.name in BATCH_NORM]
    assert len(left) == report.count("left alone")
    assert type(folded) is type(model)
    assert [name for name, _ in folded.named_children()] == [name for name, _ in model.named_children()]
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())


@pytest.mark.parametrize("what", PROBES)
def test_what_is_folded_is_right_before_it_is_proven(what):
    """Else the proof would undo it, and nobody would know how good the rules are."""
    _, forward, children = PROBES[what]
    model = with_statistics(Odd(forward, **copy.deepcopy(children)))
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    folded, report = fold(model, x, prove=False)
    for one, two in zip(outputs(folded, x), outputs(model, x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert report.layers == fold(model, x)[1].layers


def test_a_fold_that_changes_the_output_is_undone_and_the_others_stay():
    """A forward that reads a weight where nobody sees it."""

    def forward(m, x):
        y = m.bn(m.a(x)) + ctypes.cast(m.a.weight.data_ptr(), ctypes.POINTER(ctypes.c_double))[0]
        return m.d(m.b(y))

    model = with_statistics(Odd(forward, a=conv(), b=conv(), d=nn.BatchNorm2d(6), **copy.deepcopy(NORM)))
    model.requires_grad_(False)
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    folded, report = fold(model, x)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert report["d"].outcome == "folded"
    assert report["bn"].why.startswith("folded into a it would change the output by")


def test_a_layer_that_is_not_called_is_named():
    model = with_statistics(
        Odd(lambda m, x: m.bn(m.a(x)), a=conv(), bn=nn.BatchNorm2d(6), unused=nn.BatchNorm2d(6))
    )
    _, report = fold(model, torch.randn(2, 6, 8, 8, dtype=torch.float64))
    assert report["unused"].why == "was not called with these inputs"
    assert str(report["bn"]).count("into a") == 1


@pytest.mark.parametrize("kernels", ["native", "torch", "reference"])
@pytest.mark.parametrize("activation", [None, "relu", nn.SiLU()])
def test_our_layers_keep_their_activation_and_their_residual(kernels, activation):
    layer = bn.BatchNorm2d(6, activation=activation)
    model = with_statistics(Odd(lambda m, x: m.bn(m.a(x), residual=x), a=conv(False), bn=layer))
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    with bn.kernels.use(kernels):
        folded, report = fold(model, x)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert report["bn"].outcome == "folded", report
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())


def test_our_layers_that_do_more_are_left_with_the_reason():
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    masked = Odd(lambda m, x: m.bn(m.a(x), mask=x[:, :1] > 0), a=conv(), bn=bn.BatchNorm2d(6))
    named = Odd(lambda m, x: m.bn(input=m.a(x), residual=x), a=conv(), bn=bn.BatchNorm2d(6))
    each = Odd(lambda m, x: m.bn(m.a(x)), a=conv(), bn=bn.BatchNorm2d((6, 8, 8)))
    for model, why in ((masked, "takes a mask"), (named, "by name"), (each, "statistics of each activation")):
        model = with_statistics(model)
        folded, report = fold(model, x)
        assert why in report["bn"].why
        torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_the_statistics_are_those_of_the_active_domain():
    model = with_statistics(Odd(lambda m, x: m.bn(m.a(x)), a=conv(), bn=bn.BatchNorm2d(6)))
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    with bn.domain("night"):
        model.train()(3 * x + 1)
        model.eval()
        folded, report = fold(model, x)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert report["bn"].outcome == "folded"
    assert (folded(x) - model(x)).abs().max() > 0.1  # which are not the layer's own


@pytest.mark.parametrize("statistics", [bn.Renorm(3.0, 5.0), bn.Ghost(2), bn.Population(), bn.Sync()])
def test_the_source_of_a_batch_s_moments_is_no_matter_in_evaluation(statistics):
    model = with_statistics(
        Odd(lambda m, x: m.bn(m.a(x)), a=conv(), bn=bn.BatchNorm2d(6, statistics=statistics))
    )
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    folded, report = fold(model, x)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert report["bn"].outcome == "folded", report


def test_frozen_layers_of_torchvision():
    ops = pytest.importorskip("torchvision.ops")
    layer = ops.FrozenBatchNorm2d(6)
    for values in layer.buffers():
        nn.init.uniform_(values, 0.5, 2)
    model = Odd(lambda m, x: m.bn(m.a(x)).relu(), a=conv(), bn=layer).double().eval()
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    folded, report = fold(model, x)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert report["bn"].outcome == "folded" and isinstance(folded.bn, nn.Identity)


ZOO = {
    "resnet18": 20, "mobilenet_v3_small": 34, "densenet121": 59, "shufflenet_v2_x0_5": 56, "googlenet": 57,
    "timm/levit_128s": 50, "timm/mixnet_s": 49, "timm/efficientnet_b0": 49, "timm/repvit_m0_9": 82,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_real_networks(name):
    size = 224 if "levit" in name else 64
    if name.startswith("timm/"):
        model = pytest.importorskip("timm").create_model(name.removeprefix("timm/"))
    else:
        options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
        model = pytest.importorskip("torchvision").models.get_model(name, weights=None, **options)
    model = with_statistics(model)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    folded, report = fold(model, x)
    with torch.no_grad():
        expected, found = model(x), folded(x)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert report.count("folded") >= ZOO[name], report


MUTATIONS = [
    Mutation(
        "readers of a weight not looked for", "passes/fold/plan.py",
        "            if not users <= {_behind_turn(reader) for reader in readers}:", "            if False:",
        "a convolution that is called elsewhere too would be scaled there",
    ),
    Mutation(
        "a sum is shifted twice", "passes/fold/preceding.py",
        "        shifted[channels[new]] = True", "        pass",
        "each term would bring the layer's shift",
    ),
    Mutation(
        "into a convolution that pads", "graph/linear.py",
        "        return not self.transposed and not any(self.operation.arguments[4])",
        "        return not self.transposed",
        "its border would see zeros where it saw shifted ones",
    ),
    Mutation(
        "the shift of a branch is left out", "passes/fold/branches.py",
        "            wanted.want_bias(linear, shift)", "            pass",
        "the branch's term would be missing",
    ),
]  # fmt: skip
