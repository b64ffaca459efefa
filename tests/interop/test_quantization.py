"""torch's and torchao's quantization and fusion: right through an exported graph, else refused with advice."""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.testing import assert_close

import batchnorm as bn
from tests.mutations.mutation import Mutation
from tests.passes.compare import unlike

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
quantization = pytest.importorskip("torch.ao.quantization")
FIRST = r"call bn\.downgrade\(model\) first"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.body(self.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


def pair(training=False, **options):
    theirs = unlike(Net()).train(training)
    return theirs, bn.upgrade(copy.deepcopy(theirs), **options)[0]


X = torch.randn(4, 3, 16, 16)
each_upgrade = pytest.mark.parametrize("fused", [True, False], ids=["fused", "swapped"])


@each_upgrade
@pytest.mark.parametrize("inplace", [True, False])
def test_torch_fx_s_fuse(fused, inplace):
    theirs, ours = pair(fuse=fused)
    with pytest.raises(
        RuntimeError, match=rf"^torch\.fx\.experimental\.optimization\.fuse handles .* {FIRST}"
    ):
        fuse(ours, inplace=inplace)
    folded = fuse(bn.downgrade(ours)[0])
    assert not any(isinstance(each, nn.BatchNorm2d) for each in folded.modules())
    assert_close(folded(X), theirs(X), rtol=1e-4, atol=1e-5)


def test_it_can_still_be_traced():
    _, ours = pair()
    assert_close(torch.fx.symbolic_trace(ours)(X), ours(X))


@each_upgrade
@pytest.mark.parametrize("qat", [True, False])
def test_eager_fuse_modules(fused, qat):
    _, ours = pair(training=qat, fuse=fused)
    run = quantization.fuse_modules_qat if qat else quantization.fuse_modules
    for names in (["conv", "norm", "relu"], ["conv", "norm"], ["body.0", "body.1", "body.2"]):
        with pytest.raises(RuntimeError, match=FIRST):
            run(ours, names)
    run(bn.downgrade(ours)[0], ["conv", "norm", "relu"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "googlenet"])
def test_torchvision_s_fuse_model(name):
    models = pytest.importorskip("torchvision").models.quantization
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    theirs = unlike(getattr(models, name)(weights=None, num_classes=4, **options)).eval()
    ours, _ = bn.upgrade(copy.deepcopy(theirs))
    with pytest.raises(RuntimeError, match=FIRST):
        copy.deepcopy(ours).fuse_model()
    ours, _ = bn.downgrade(ours)
    x = torch.randn(2, 3, 64, 64)
    expected = theirs(x)
    ours.fuse_model()
    assert not any(isinstance(each, nn.BatchNorm2d) for each in ours.modules())
    assert_close(ours(x), expected, rtol=1e-3, atol=1e-4)


@each_upgrade
@pytest.mark.parametrize("qat", [True, False])
def test_fx_graph_mode(fused, qat):
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    _, ours = pair(training=qat, fuse=fused)
    prepare = fx.prepare_qat_fx if qat else fx.prepare_fx
    mapping = quantization.get_default_qconfig_mapping()
    with pytest.raises(RuntimeError, match=rf"^FX quantization handles .* {FIRST}"):
        prepare(ours, mapping, (X,))
    prepared = prepare(bn.downgrade(ours)[0], mapping, (X,))
    prepared(X)
    converted = fx.convert_fx(prepared.eval())
    assert not any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in converted.modules())


def quantized(model, qat, strict):
    """What pt2e makes of `model`, and the operators of it."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e")
    prepare = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    graph = torch.export.export(model, (X,), strict=strict).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=qat))
    graph = (prepare.prepare_qat_pt2e if qat else prepare.prepare_pt2e)(graph, quantizer)
    graph(X)
    if qat:
        pt2e.move_exported_model_to_eval(graph)
    graph = prepare.convert_pt2e(graph)
    # torchao takes the counters of torch's BatchNorm2d, by that name, out of a training graph; they do nothing there
    operators = sorted(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return graph, [name for name in operators if name != "aten.add_.Tensor"]


@pytest.mark.slow
@pytest.mark.parametrize(("strict", "qat"), [(True, True), (True, False), (False, True)])
def test_pt2e_quantizes_it(strict, qat):
    pairs = [quantized(model, qat, strict) for model in pair(training=qat)]
    (theirs, expected), (ours, found) = pairs
    assert any("quantize_per" in name for name in found)
    assert not any("batch_norm" in name for name in found)
    scale = theirs(X).abs().max()
    if (
        strict
    ):  # by the functions that were called; else by the names of classes, and some activations stay floats
        assert found == expected
        assert_close(ours(X), theirs(X), rtol=1e-4, atol=float(scale) * 1e-4)
    assert (ours(X) - theirs(X)).abs().max() < 0.03 * scale


MUTATIONS = [
    Mutation(
        "a tracer is a tracer", "layers.py",
        "        guards.check_tracer(proxy.tracer)\n", "",
        "a fuse that does nothing, floats between quantized convolutions",
    ),
    Mutation(
        "an Identity in a pattern unknown", "guards.py",
        "(kind, nn.Identity) if kind is nn.ReLU else (kind,)", "(kind,)",
        "torchvision's fuse_model says that it knows no fuser method",
    ),
]  # fmt: skip
