"""Packed convolutions compute what the folded model does, and what they cannot do torch does."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.passes.fold import fold
from batchnorm.passes.fold.packed import PackedConv2d
from tests.mutations.mutation import Mutation
from tests.passes.test_fold import Odd, conv, hooked, with_statistics

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
X = torch.randn(2, 6, 8, 8)


class Residual(nn.Module):
    """As torchvision's blocks: one ReLU for all of its calls."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(False), nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2)
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn2(self.b(self.relu(self.bn1(self.a(x)))))
        y += x
        return self.relu(y)


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(), nn.LeakyReLU(0.3), nn.Hardswish(),
    nn.GELU(), nn.GELU("tanh"),
]  # fmt: skip


def of(*layers):
    return with_statistics(nn.Sequential(*layers)).float()


def same(one, two, x, tolerance=2e-5):
    with torch.no_grad():
        torch.testing.assert_close(one(x), two(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_the_activation_is_done_by_the_convolution(activation):
    model = of(conv(), nn.BatchNorm2d(6), activation, nn.MaxPool2d(2))
    packed, report = fold(model, X, pack=True)
    assert report.packed == 1 and report.count("folded") == 1
    assert not [each for each in packed.modules() if type(each) is type(activation)]
    for x in (X, X.contiguous(memory_format=torch.channels_last), torch.randn(3, 6, 5, 9), X[:1]):
        same(packed, model, x)


def test_a_residual_is_added_in_the_same_call():
    model = with_statistics(nn.Sequential(Residual(), Residual())).float()
    packed, report = fold(model, X, pack=True)
    assert report.packed == 4
    same(packed, model, X)
    with torch.no_grad(), torch.profiler.profile() as profiled:
        packed(X)
    names = [each.name for each in profiled.events()]
    assert sum(name == "mkldnn::_convolution_pointwise" for name in names) == 4
    assert not {"aten::add_", "aten::add", "aten::relu_", "aten::convolution", "aten::relu"} & {*names}


def test_a_branch_that_is_gone_is_no_residual():
    """RepVGG, upgraded: the last normalization takes the other branches' sum as its residual."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(False), nn.Conv2d(6, 6, 1)
            self.n, self.n1, self.n2 = (nn.BatchNorm2d(6) for _ in range(3))
            self.act = nn.ReLU()

        def forward(self, x):
            y = self.n1(self.a(x)) + self.n2(self.b(x))
            return self.act(self.n(x) + y)

    model = with_statistics(nn.Sequential(Block(), Block())).float()
    packed, report = fold(model, X, pack=True)
    assert report.packed >= 2
    same(packed, model, X)


def test_what_reads_the_convolution_s_output_otherwise_still_does():
    for forward in (
        lambda m, x: m.act(y := m.a(x)) + y,
        lambda m, x: m.act(m.a(x)) + m.act(x),
        lambda m, x: m.act(m.a(x).sin()),
        lambda m, x: m.act(m.a(m.a(x))),
        lambda m, x: m.act(F.conv2d(x, m.a.weight)),
    ):
        model = with_statistics(Odd(forward, a=conv(), act=nn.ReLU(), bn=nn.BatchNorm2d(6))).float()
        packed, _ = fold(model, X, pack=True)
        assert type(packed.get_submodule("act")) is nn.ReLU
        same(packed, model, X)


def test_what_is_no_plain_convolution_of_images_is_not_packed():
    for layers, x in (
        ([nn.Conv1d(6, 4, 3)], X[..., 0]),
        ([nn.ConvTranspose2d(6, 4, 3)], X),
        ([nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")], X),
        ([nn.Conv2d(6, 4, 3, padding="same")], X),
        ([hooked(conv())], X),
    ):
        model = of(*layers, nn.ReLU())
        packed, report = fold(model, x, pack=True)
        assert report.packed == 0
        same(packed, model, x)


def test_where_onednn_cannot_be_asked_torch_computes():
    model = with_statistics(nn.Sequential(Residual(), conv(), nn.BatchNorm2d(6), nn.SiLU())).float()
    packed, report = fold(model, X, pack=True)
    assert report.packed == 3
    x = X.clone().requires_grad_()
    ours, theirs = (torch.autograd.grad(each(x).square().sum(), x)[0] for each in (packed, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    same(copy.deepcopy(packed).double(), copy.deepcopy(model).double(), X.double(), 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        same(packed, model, X, 0.1)
    program = torch.export.export(packed, (X,))
    assert not [node for node in program.graph.nodes if "mkldnn" in str(node.target)]
    same(program.module(), model, X)
    same(torch.func.vmap(packed, randomness="error"), torch.func.vmap(model), torch.randn(2, 2, 6, 8, 8))


def test_copies_files_and_new_weights():
    model = of(conv(), nn.BatchNorm2d(6), nn.ReLU())
    packed, _ = fold(model, X, pack=True)
    same(packed, model, X)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for again in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
        same(again, model, X)
        assert again.state_dict().keys() == {"0.weight", "0.bias"}
    layer = packed[0]
    assert isinstance(layer, PackedConv2d)
    with torch.no_grad():
        layer.weight.mul_(2)
        torch.testing.assert_close(
            packed(X), F.conv2d(X, layer.weight, layer.bias, padding=1).relu(), rtol=1e-4, atol=1e-4
        )
        layer.load_state_dict({name: -values.clone() for name, values in layer.state_dict().items()})
        torch.testing.assert_close(
            packed(X), F.conv2d(X, layer.weight, layer.bias, padding=1).relu(), rtol=1e-4, atol=1e-4
        )
    assert "activation='relu'" in repr(layer)


def test_the_model_itself_is_not_upgraded():
    model = with_statistics(Residual()).float()
    forward = type(model).forward
    fold(model, X, pack=True)
    assert type(model) is Residual and type(model).forward is forward
    assert type(model.bn1) is nn.BatchNorm2d


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "convolutions"),
    [
        ("resnet18", 20),
        ("mobilenet_v2", 52),
        ("densenet121", 120),
        ("googlenet", 57),
        ("timm/efficientnet_b0", 81),
    ],
)
def test_real_networks(name, convolutions):
    if name.startswith("timm/"):
        model = pytest.importorskip("timm").create_model(name.removeprefix("timm/"))
    else:
        options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
        model = pytest.importorskip("torchvision").models.get_model(name, weights=None, **options)
    model = with_statistics(model).float()
    x = torch.randn(2, 3, 64, 64)
    packed, report = bn.fold(model, x, pack=True)
    assert report.packed == convolutions and report.error < 1e-4
    with torch.no_grad():
        expected = model(x)
        assert (packed(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


MUTATIONS = [
    Mutation(
        "the packed weight is kept", "passes/fold/packed.py",
        "        if cached is None or cached[0] != key:", "        if cached is None:",
        "new weights would have no effect",
    ),
    Mutation(
        "the residual is left out where oneDNN is not", "passes/fold/packed.py",
        "self.activation, residual)\n", "self.activation, None)\n",
        "gradients and exports would be those of another model",
    ),
]  # fmt: skip
