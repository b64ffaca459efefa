"""Folding into what comes before: odd models, each held against itself in float64, and real networks."""

import copy
import ctypes
import random

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


def before_hooked(module):
    module.register_forward_pre_hook(lambda *_: None)
    return module


def keep(m, y):
    m.kept = y.detach()
    return y


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
    "a hook on what is around it": (
        0, lambda m, x: m.bn(m.s(x)).relu(), {"s": observed(nn.Sequential(conv())), **NORM},
    ),
    "a hook between": (0, lambda m, x: m.bn(m.i(m.a(x))), {"a": conv(), "i": observed(nn.Identity()), **NORM}),
    "a hook before the convolution behind": (
        0, lambda m, x: m.s(m.bn(x.sin())), {"s": before_hooked(nn.Sequential(padless())), **NORM},
    ),
    "a part of the batch, the other elsewhere": (
        0, lambda m, x: m.bn((p := m.a(x).chunk(2))[0]) * p[1].sigmoid(), {"a": conv(), **NORM},
    ),
    "a part of the image, the other elsewhere": (
        0, lambda m, x: m.bn((p := m.a(x).chunk(2, 2))[0]) * p[1].sigmoid(), {"a": conv(), **NORM},
    ),
    "kept in an attribute": (0, lambda m, x: m.bn(keep(m, m.a(x))), {"a": conv(), **NORM}),
    "its weight is read elsewhere": (0, lambda m, x: m.bn(m.a(x)) * m.bn.weight.sum(), {"a": conv(), **NORM}),
    "a term that is read elsewhere": (
        0, lambda m, x: m.bn(m.a(x) + m.p) + m.p.mean(),
        {"a": conv(False), "p": nn.Parameter(torch.randn(6, 8, 8)), **NORM},
    ),
    "a linear layer whose bias is added": (
        1, lambda m, x: m.a(m.bn(x.relu()).flatten(2).transpose(1, 2)), {"a": nn.Linear(6, 4), **NORM},
    ),
    "a pool that is cut off": (
        0, lambda m, x: m.bn(F.avg_pool2d(m.a(x), 3, ceil_mode=True, divisor_override=9)), {"a": conv(), **NORM},
    ),
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


BORDERS = {
    "1d": (nn.Conv1d(6, 4, 3, padding=1), nn.BatchNorm1d(6), (2, 6, 9), (3, 6, 7)),
    "2d": (nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(6), (2, 6, 8, 8), (1, 6, 5, 9)),
    "2d, all": (
        nn.Conv2d(6, 4, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2), groups=2, bias=False),
        nn.BatchNorm2d(6), (2, 6, 8, 9), (2, 6, 6, 6),
    ),
    "3d": (nn.Conv3d(6, 4, 3, padding=1), nn.BatchNorm3d(6), (2, 6, 4, 4, 4), (1, 6, 3, 4, 5)),
}  # fmt: skip


@pytest.mark.parametrize("case", BORDERS)
def test_a_convolution_that_pads_gets_a_map_of_its_border(case):
    a, norm, shape, other = copy.deepcopy(BORDERS[case])
    model = with_statistics(Odd(lambda m, x: m.a(m.bn(x.sin())).relu(), a=a, bn=norm))
    assert fold(model, torch.randn(shape, dtype=torch.float64))[1]["bn"].outcome == "affine"
    folded, report = fold(model, torch.randn(shape, dtype=torch.float64), borders=True)
    assert report["bn"].outcome == "folded" and isinstance(folded.a, type(a))
    for each in (shape, other, shape):  # the map is made for each size of an image
        x = torch.randn(each, dtype=torch.float64)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    x = torch.randn(shape, dtype=torch.float64)
    again = copy.deepcopy(folded).float()
    torch.testing.assert_close(again(x.float()), model(x).float(), rtol=1e-4, atol=1e-4)
    program = torch.export.export(folded, (x,)).module()
    torch.testing.assert_close(program(x), model(x), rtol=1e-12, atol=1e-12)


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


def test_the_report_names_the_one_convolution_of_a_block():
    _, forward, children = PROBES["RepVGG"]
    model = with_statistics(Odd(forward, **copy.deepcopy(children)))
    folded, report = fold(model, torch.randn(2, 6, 8, 8, dtype=torch.float64))
    assert [layer.what for layer in report.layers] == ["into a"] * 3
    assert [type(each).__name__ for each in folded.children()] == [
        "Conv2d",
        "Nothing",
        "Identity",
        "Identity",
        "Nothing",
    ]
    calls = [each.name for each in observe(folded, torch.randn(2, 6, 8, 8, dtype=torch.float64)).operations]
    assert calls == ["aten.convolution", "aten.relu"]  # one convolution, and nothing is added
    assert str(report).splitlines()[-1].startswith("3 layers: 3 folded (traced; outputs differ by ")


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
    for model, why, outcome in (
        (masked, "takes a mask", "left alone"),
        (named, "by name", "left alone"),
        (each, "statistics of each activation", "affine"),
    ):
        model = with_statistics(model)
        folded, report = fold(model, x)
        assert why in report["bn"].why and report["bn"].outcome == outcome
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


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(), nn.Tanh()], ids=repr)
def test_an_upgraded_model_stays_fused(activation):
    """Its rewritten forward calls what took the layers' places as it called the layers."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = conv(False), conv(False), activation
            self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

        def forward(self, x):
            y = self.bn2(self.b(self.act(self.bn1(self.a(x)))))
            y += x
            return self.act(y)

    model = with_statistics(nn.Sequential(Block(), Block()))
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    expected = model(x)
    upgraded, fusions = bn.upgrade(copy.deepcopy(model))
    assert fusions.count("fused") == 4
    folded, report = fold(upgraded, x)
    assert report.count("folded") == 4
    for each in (folded, copy.deepcopy(folded)):
        torch.testing.assert_close(each(x), expected, rtol=1e-12, atol=1e-12)
        block = each[0]
        assert type(block).forward is not Block.forward and block.bn2.activation is not None  # not unfused
    calls = [each.name for each in observe(folded, x).operations]
    assert not [name for name in calls if name in BATCH_NORM]
    assert len([name for name in calls if "convolution" in name]) == 4
    torch.testing.assert_close(upgraded(x), expected, rtol=1e-12, atol=1e-12)


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


class Outside(nn.Module):
    """A normalization of a class that nobody knows, with eps outside of the root, as some have it."""

    def __init__(self, power=1):
        super().__init__()
        self.power = power
        self.register_buffer("running_mean", torch.randn(6))
        self.register_buffer("running_var", torch.rand(6) + 0.5)

    def forward(self, x):
        mean, deviation = self.get_buffer("running_mean"), self.get_buffer("running_var").sqrt()
        y = (x - mean[:, None, None]) / (deviation[:, None, None] + 1e-3)
        return y if self.power == 1 else y**self.power


def test_a_layer_of_any_class_is_seen_by_calling_it():
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    for layer, outcome in ((Outside(), "folded"), (Outside(2), "left alone")):
        model = with_statistics(Odd(lambda m, x: m.bn(m.a(x)).relu(), a=conv(), bn=layer))
        folded, report = fold(model, x)
        assert report["bn"].outcome == outcome
        torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert report["bn"].why == (
        "is Outside, which does more in evaluation than multiply and shift each channel: aten.pow"
    )


class Clamped(nn.Module):
    """As reinforcement learning normalizes observations: few values reach the bounds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("running_var", torch.full((6,), 100.0))

    def forward(self, x):
        return ((x - self.running_mean) / (self.get_buffer("running_var") + 1e-5).sqrt()).clamp(-5, 5)


def test_a_layer_that_clamps_is_left_alone():
    model = nn.Sequential(Clamped(), nn.Linear(6, 3)).double().eval()
    folded, report = fold(model, torch.randn(8, 6, dtype=torch.float64))
    assert report["0"].why.endswith("more in evaluation than multiply and shift each channel: aten.clamp")
    x = 1000 * torch.randn(8, 6, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x))


def test_what_cannot_be_replaced_everywhere_is_left_alone():
    model = with_statistics(Odd(lambda m, x: m.norms[0](m.a(x)), a=conv(), bn=nn.BatchNorm2d(6)))
    model.norms = [model.bn]
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    folded, report = fold(model, x)
    assert report["bn"].why == "is also kept in norms, where it could not be replaced"
    torch.testing.assert_close(folded(x), model(x))


def test_classes_and_spectra_must_be_the_same_too():
    for forward in (
        lambda m, x: (m.bn(m.a(x)), m.a(x).flatten(1).argmax(1)),
        lambda m, x: torch.fft.fft(m.bn(m.a(x))),
    ):
        model = with_statistics(Odd(forward, a=conv(), **copy.deepcopy(NORM)))
        x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
        folded, _ = fold(model, x)
        for one, two in zip(outputs(folded, x), outputs(model, x), strict=True):
            torch.testing.assert_close(one, two)


def test_odd_models_are_folded_all_the_same():
    def counting(m, x):
        m.n.add_(1)
        return m.bn(m.a(x)) / m.n

    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    counted = with_statistics(Odd(counting, a=conv(), **copy.deepcopy(NORM)))
    counted.register_buffer("n", torch.zeros((), dtype=torch.float64))
    plain = with_statistics(nn.Sequential(conv(), nn.BatchNorm2d(6)))
    scripted = with_statistics(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()))
    with pytest.warns(FutureWarning, match="jit"):
        scripted[2] = torch.jit.script(nn.Sigmoid())
    old = with_statistics(nn.Sequential(conv(), nn.BatchNorm2d(6), conv()))
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(old[2])
    permuted = with_statistics(
        Odd(lambda m, x: m.a(m.bn(x.sin()).permute(0, 2, 3, 1)), a=nn.Linear(6, 4), **NORM)
    )
    for model in (counted, plain, scripted, old, permuted):
        state = copy.deepcopy(model.state_dict())
        folded, report = fold(model, x.contiguous(memory_format=torch.channels_last).requires_grad_())
        assert report.count("folded") == 1, report
        assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
        with torch.no_grad():
            expected = model(x)
            if model is counted:
                folded(x)  # once more, as the model has counted one more
                folded.n.copy_(model.n - 1)
            torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        assert fold(plain, torch.randn(2, 6, 8, 8).double())[1].count("folded") == 1
    noisy = with_statistics(Odd(lambda m, x: m.bn(m.a(x)) + random.random(), a=conv(), **NORM))
    with pytest.raises(ValueError, match=r"computes something else each time .* pass prove=False"):
        fold(noisy, x)


def test_a_model_whose_outputs_jump_is_proven_layer_by_layer():
    """It looks at the signs of numbers that are 0 but for rounding."""

    def forward(m, x):
        y = m.bn(m.a(x))
        return y * (y.double().cumsum(3)[..., -1:] - y.flip(3).cumsum(3)[..., -1:]).sign()

    model = with_statistics(Odd(forward, a=conv(), **copy.deepcopy(NORM)))
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    folded, report = fold(model, x)
    assert report["bn"].outcome == "folded" and report.noise > 0.1
    assert ", as they do when weights are rounded; " in report.summary
    torch.testing.assert_close(folded.bn(folded.a(x)), model.bn(model.a(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrapper", ["DataParallel", "DistributedDataParallel"])
def test_a_wrapper_for_many_devices_is_left_out(wrapper, tmp_path):
    model = with_statistics(nn.Sequential(conv(), nn.BatchNorm2d(6)))
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    wrapped: nn.Module = nn.DataParallel(model)
    if wrapper == "DataParallel":
        folded, report = fold(wrapped, x)
    else:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
        )
        wrapped = nn.parallel.DistributedDataParallel(model)
        folded, report = fold(wrapped, x)
        torch.distributed.destroy_process_group()
    assert type(folded) is nn.Sequential and report["1"].outcome == "folded"
    torch.testing.assert_close(folded(x), model(x))


def test_timm_s_layers_keep_their_activation():
    layers = pytest.importorskip("timm.layers")
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    for act, left in ((nn.SiLU, nn.SiLU), (nn.PReLU, nn.PReLU), (nn.Identity, nn.Identity)):
        norm = layers.BatchNormAct2d(6, act_layer=act)
        model = with_statistics(Odd(lambda m, x: m.bn(m.a(x)), a=conv(), bn=norm))
        folded, report = fold(model, x)
        assert report["bn"].outcome == "folded" and type(folded.bn) is left
        torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    norm = layers.BatchNormAct2d(6, act_layer=nn.PReLU)
    model = with_statistics(Odd(lambda m, x: m.bn(x.sin()), bn=norm)).float()
    folded, report = fold(model, x.float())
    assert report["bn"].outcome == "affine"
    assert {each.dtype for each in folded.parameters()} == {torch.float32}
    torch.testing.assert_close(folded(x.float()), model(x.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.LeakyReLU(0.2), nn.GELU()], ids=repr)
def test_what_remains_takes_the_activation_with_it(activation):
    layers = [nn.Sigmoid(), nn.BatchNorm2d(6), activation, nn.MaxPool2d(2)]
    model = with_statistics(nn.Sequential(*layers)).float()
    x = torch.randn(2, 6, 8, 8)
    folded, report = fold(model, x)
    fused = not isinstance(activation, nn.GELU)
    assert report["1"].outcome == "affine" and report["1"].what.startswith("with ") == fused
    assert isinstance(folded[2], nn.Identity) == fused
    for kernels in ("native", "torch", "reference"):
        with bn.kernels.use(kernels):
            torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), model(x), rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    ours, theirs = (torch.autograd.grad(each(x).sum(), x)[0] for each in (folded, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_rounded_once_to_the_dtype_that_they_have(dtype):
    model = with_statistics(
        Odd(lambda m, x: m.c(m.bn(m.a(x)).sin()), a=conv(False), c=nn.BatchNorm2d(6), **NORM)
    )
    expected, _ = fold(model, torch.randn(2, 6, 8, 8, dtype=torch.float64))
    model = model.to(dtype)
    expected, _ = fold(copy.deepcopy(model).double(), torch.randn(2, 6, 8, 8, dtype=torch.float64))
    model.bn.float()  # as mixed precision keeps them
    x = torch.randn(2, 6, 8, 8, dtype=dtype)
    folded, report = fold(model, x)
    assert (report["bn"].outcome, report["c"].outcome) == ("folded", "affine")
    assert folded.a.weight.dtype == folded.a.bias.dtype == folded.c.weight.dtype == folded(x).dtype == dtype
    assert torch.equal(folded.a.weight, expected.a.weight.to(dtype))
    assert report.error <= 4 * torch.finfo(dtype).eps


def test_what_a_run_keeps_in_the_model_does_not_come_with_the_copy():
    def forward(m, x):
        m.kept = getattr(m, "kept", x.new_zeros(6, 1, 1) + 2)  # as LeViT keeps its biases in evaluation
        return m.bn(m.a(x)) + m.kept

    model = with_statistics(Odd(forward, a=conv(), **copy.deepcopy(NORM))).float()
    x = torch.randn(2, 6, 8, 8)
    for _ in range(2):  # the second time the model has run
        folded, report = fold(model, x)
        assert report["bn"].outcome == "folded" and report.error < 1e-6
        torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_model_that_computes_in_float32_by_itself_is_folded():
    def forward(m, x):
        return m.bn(m.a(x)).float().softmax(1).to(x.dtype)

    def only_in_float32(m, x):
        return m.bn(m.a(x)) @ torch.ones(8, 8, dtype=torch.float32)

    x = torch.randn(2, 6, 8, 8)
    for each in (forward, only_in_float32):
        model = with_statistics(Odd(each, a=conv(), **copy.deepcopy(NORM))).float()
        folded, report = fold(model, x)
        assert report["bn"].outcome == "folded" and report.error < 1e-5
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_weights_alone_the_flags_and_the_modes():
    model = with_statistics(nn.Sequential(conv(False), nn.BatchNorm2d(6), nn.ReLU())).train()
    model[0].weight.requires_grad_(False)
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    folded, _ = fold(model, x)
    assert not folded[0].weight.requires_grad and not folded[0].bias.requires_grad
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in folded.modules())
    state, report = fold(model, x, into="state_dict")
    assert {*state} == {"0.weight", "0.bias"} and torch.equal(state["0.bias"], folded.state_dict()["0.bias"])
    assert report.parameters == (6 * 6 * 9 + 12, 6 * 6 * 9 + 6)


def test_inputs_by_name_and_what_the_model_returns():
    class Result:
        def __init__(self, y):
            self.parts = {"y": y}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn = conv(), nn.BatchNorm2d(6)

        def forward(self, x, *, scale, as_object=False):
            y = self.bn(self.a(x)) * scale
            return Result(y) if as_object else None if scale is None else y

    model = with_statistics(Model())
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    for as_object in (False, True):
        folded, report = fold(model, x, scale=torch.full((1,), 2.0), as_object=as_object)
        assert report["bn"].outcome == "folded"
        torch.testing.assert_close(folded(x, scale=3.0), model(x, scale=3.0), rtol=1e-12, atol=1e-12)


def test_what_cannot_be_folded_at_all_is_refused_by_name():
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    model = with_statistics(Odd(lambda m, x: m.bn(m.a(x)).shape, a=conv(), **copy.deepcopy(NORM)))
    with pytest.raises(ValueError, match=r"returns no tensors, .* or pass prove=False"):
        fold(model, x)
    assert fold(model, x, prove=False)[1]["bn"].outcome == "folded"
    with pytest.raises(ValueError, match='into must be "model" or "state_dict"'):
        fold(model, x, into="weights")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"pass an instance, Odd\(\.\.\.\)"):
        fold(Odd, x)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="the model is compiled: observe the module itself, its _orig_mod"):
        fold(torch.compile(with_statistics(nn.Sequential(conv(), nn.BatchNorm2d(6)))), x)  # type: ignore[call-overload]


ZOO = {
    "resnet18": 20, "mobilenet_v3_small": 34, "densenet121": 59, "shufflenet_v2_x0_5": 56, "googlenet": 57,
    "timm/levit_128s": 52, "timm/mixnet_s": 49, "timm/efficientnet_b0": 49, "timm/repvit_m0_9": 98,
    "timm/repvgg_a0": 61, "timm/mobileone_s0": 226, "timm/fastvit_t8": 70,
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
    model = with_statistics(model).float()
    x = torch.randn(2, 3, size, size)
    folded, report = fold(model, x)
    with torch.no_grad():
        expected, found = model(x), folded(x)
        wide, in_float64 = (
            copy.deepcopy(folded).double()(x.double()),
            copy.deepcopy(model).double()(x.double()),
        )
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (wide - in_float64).abs().max() <= 1e-6 * in_float64.abs().max()  # weights are rounded to float32
    assert report.count("folded") >= ZOO[name], report
    assert report.count("folded") + report.count("affine") == len(report.layers)
    assert not [each for each in observe(folded, x).operations if each.name in BATCH_NORM]


@pytest.mark.slow
def test_detection_which_takes_lists_and_returns_dicts():
    detection = pytest.importorskip("torchvision").models.detection
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    model = with_statistics(model).float()
    images = [torch.rand(3, 64, 48)]
    folded, report = fold(model, images)
    assert report.summary.startswith(f"{len(report.layers)} layers: {len(report.layers)} folded")
    assert report.known == "observed"
    x = torch.rand(1, 3, 64, 48)
    for one, two in zip(folded.backbone(x).values(), model.backbone(x).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


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
