"""ONNX by both of torch's exporters, run by onnxruntime: the nodes of torch's layers, and the same numbers."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import batchnorm as bn
from tests.passes.compare import unlike

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
models = pytest.importorskip("torchvision").models
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


def onnx_of(model, x, path, dynamo):
    """The path of the file that `model` was exported to, and its nodes."""
    options: dict[str, Any] = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "samples"}}}
    if dynamo:
        options = {"dynamo": True, "dynamic_shapes": ({0: Dim("samples", min=2)},), "verbose": False}
    torch.onnx.export(model, (x,), path, **options)
    return [node.op_type for node in onnx.load(path).graph.node]


def run(path, x):
    session = ort.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return output


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_an_upgraded_network(name, dynamo, tmp_path):
    theirs = unlike(models.get_model(name, weights=None, num_classes=4)).eval()
    ours, _ = bn.upgrade(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 64, 64)
    nodes = [onnx_of(model, x, tmp_path / f"{i}.onnx", dynamo) for i, model in enumerate((ours, theirs))]
    assert sorted(nodes[0]) == sorted(nodes[1])
    x = torch.randn(3, 3, 64, 64)
    np.testing.assert_allclose(run(tmp_path / "0.onnx", x), theirs(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
@pytest.mark.parametrize("statistics", [bn.Ghost(2), bn.Renorm(), bn.Sync(), bn.Population()], ids=repr)
def test_a_layer_by_itself_is_one_node(statistics, dynamo, tmp_path):
    layer = unlike(bn.BatchNorm2d(3, statistics=statistics))
    model = nn.Sequential(nn.ReLU(), layer).eval()
    nodes = onnx_of(model, torch.randn(2, 3, 5, 5), tmp_path / "layer.onnx", dynamo)
    assert nodes == ["Relu", "BatchNormalization"]
    x = torch.randn(4, 3, 5, 5)
    np.testing.assert_allclose(run(tmp_path / "layer.onnx", x), model(x).detach(), atol=1e-5)
