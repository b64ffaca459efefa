"""`batchnorm.bridges` against what other libraries' own layers said, recorded; asked again where they are installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

import batchnorm as bn
from batchnorm import bridges
from tests.mutations.mutation import Mutation

RECORDED = Path(__file__).parent / "recorded"
PROGRAM = Path(__file__).parent / "libraries.py"
PACKAGES = {
    "keras": "keras",
    "flax": "flax",
    "tf-slim": "tf_slim",
    "mxnet": "mxnet",
    "caffe": "cv2",
    "inplace_abn": "inplace_abn",
}
BIASED = ("keras", "flax", "tf-slim", "mxnet")


def tensors(value):
    if isinstance(value, dict):
        return {key: tensors(each) for key, each in value.items()}
    return [torch.tensor(each) for each in value] if isinstance(value[0], list) else torch.tensor(value)


def read(library, case, **more):
    settings = {key: value for key, value in case["settings"].items() if key != "scale"}
    return bridges.read(library, tensors(case["values"]), **settings, **more)


def close(found, outcome, name="y"):
    expected = torch.tensor(outcome[name])
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


@pytest.mark.parametrize("direction", ["read", "write"])
@pytest.mark.parametrize("library", PACKAGES)
def test_the_other_library_s_own_output(library, direction):
    recorded = json.loads((RECORDED / f"{library}.json").read_text())[direction]
    case, outcome = recorded["case"], recorded["outcome"]
    x = torch.tensor(case["x"])
    layer = read(library, case, rank=2)
    close(layer(x).detach(), outcome)
    if library in BIASED:  # the share of the old average is kept, of biased variances
        after = layer.train()
        before = [each.clone() for each in (after.running_mean, after.running_var)]
        after(x)
        n = x.numel() / x.size(1)
        close(after.running_mean, outcome, "mean")
        share, variance = after.momentum, x.var((0, 2, 3), unbiased=False)
        close(before[1] * (1 - share) + share * variance, outcome, "variance")
        close(after.running_var - share * variance / (n - 1), outcome, "variance")


@pytest.mark.parametrize("library", PACKAGES)
def test_what_is_written_reads_back(library):
    layer: Any = bn.BatchNorm2d(5, eps=2e-3, momentum=0.3)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    values, settings = bridges.write(library, layer)
    settings.pop("scale", None)
    again = bridges.read(library, values, rank=2, **settings)
    assert again.eps == layer.eps and again.momentum == pytest.approx(0.3)
    for key, value in layer.state_dict().items():
        if key != "num_batches_tracked":
            torch.testing.assert_close(again.state_dict()[key], value, rtol=1e-6, atol=1e-7)
    recorded = json.loads((RECORDED / f"{library}.json").read_text())["write"]["case"]
    assert settings.keys() <= recorded["settings"].keys()
    assert bridges.write(library, layer)[0].keys() == recorded["values"].keys()


@pytest.mark.parametrize("library", PACKAGES)
def test_the_library_still_says_so(library):
    if importlib.util.find_spec(PACKAGES[library]) is None:
        pytest.skip(f"{PACKAGES[library]} is not installed: what it said is in recorded/{library}.json")
    recorded = json.loads((RECORDED / f"{library}.json").read_text())
    for each in recorded.values():
        asked = [sys.executable, str(PROGRAM), library]
        done = subprocess.run(
            asked, input=json.dumps(each["case"]), capture_output=True, text=True, check=True
        )
        assert np.allclose(json.loads(done.stdout)["y"], each["outcome"]["y"], rtol=1e-5, atol=1e-6)


def test_frozen_layers_of_torchvision_and_detectron2():
    theirs = torchvision.ops.FrozenBatchNorm2d(6, eps=1e-4)
    with torch.no_grad():
        for buffer in theirs.buffers():
            buffer.uniform_(0.5, 2)
    x = torch.randn(2, 6, 4, 4)
    layer: Any = bridges.read("frozen", theirs.state_dict(), eps=1e-4, rank=2)
    torch.testing.assert_close(layer.train()(x), theirs(x), rtol=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in layer.parameters())
    before = layer.running_mean.clone()
    layer(x)
    assert torch.equal(before, layer.running_mean)
    values, settings = bridges.write("frozen", layer)
    again = torchvision.ops.FrozenBatchNorm2d(6, **settings)
    again.load_state_dict(values)
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-6, atol=1e-6)
    # detectron2's backbones from Caffe2 have weight and bias alone, and are y = weight·x + bias
    weight, bias = torch.randn(6), torch.randn(6)
    layer = bridges.read("frozen", {"weight": weight, "bias": bias}, rank=2)
    torch.testing.assert_close(
        layer(x), x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1), rtol=1e-6, atol=1e-6
    )


def test_timm_s_layer():
    options: Any = {"eps": 2e-3, "momentum": 0.2, "act_layer": None}
    theirs = timm.layers.BatchNormAct2d(6, **options)  # type: ignore[attr-defined]
    theirs(torch.randn(4, 6, 5, 5))
    x = torch.randn(2, 6, 5, 5)
    layer = bridges.read("timm", theirs.state_dict(), eps=2e-3, momentum=0.2)
    torch.testing.assert_close(layer(x), theirs.eval()(x))
    torch.testing.assert_close(layer.train()(x), theirs.train()(x))
    torch.testing.assert_close(layer.running_var, theirs.running_var)


def test_numpy_lists_and_what_is_absent():
    statistics = {"moving_mean": np.ones(3, np.float32), "moving_variance": [4.0, 4.0, 4.0]}
    layer = bridges.read(
        "tf-slim", {"beta": np.zeros(3), **statistics}, epsilon=0.0
    )  # scale=False, as by default
    torch.testing.assert_close(layer(torch.full((1, 3), 5.0)).detach(), torch.full((1, 3), 2.0))
    assert layer.momentum == pytest.approx(0.001)
    exact: Any = bridges.read("flax", {"mean": np.zeros(3), "var": np.ones(3)})
    assert exact.running_mean.dtype == torch.float64


def test_mxnet_s_gamma_is_1_where_it_is_fixed():
    values = {"gamma": torch.full((3,), 9.0), "beta": torch.zeros(3), "running_mean": torch.zeros(3)}
    values["running_var"] = torch.ones(3)
    layer = bridges.read("mxnet", values)
    assert torch.equal(layer.weight.data, torch.ones(3)) and not layer.weight.requires_grad
    assert bridges.write("mxnet", layer)[1]["fix_gamma"] is True
    layer = bridges.read("mxnet", values, fix_gamma=False)
    assert torch.equal(layer.weight.data, torch.full((3,), 9.0))
    assert bridges.write("mxnet", layer)[1]["fix_gamma"] is False


def test_caffe_s_factor_of_an_untrained_layer():
    zeros = torch.zeros(3)
    layer: Any = bridges.read("caffe", {"BatchNorm": [zeros, zeros, torch.zeros(1)]})
    assert torch.equal(layer.running_var, zeros)


@pytest.mark.parametrize(
    ("library", "values", "settings", "why"),
    [
        ("absurd", {}, {}, "no library 'absurd'"),
        ("keras", {"gamma": torch.ones(3)}, {}, "moving_mean is missing"),
        ("keras", {"weight": torch.ones(3)}, {}, "has no 'weight'"),
        ("keras", {"moving_mean": torch.ones(3), "moving_variance": torch.ones(4)}, {}, "has shape"),
        ("flax", {"mean": torch.ones(3), "var": torch.ones(3)}, {"eps": 1e-3}, "no setting 'eps'"),
        ("caffe", {"BatchNorm": [torch.ones(3)]}, {}, "the blobs"),
        ("inplace_abn", {"running_mean": torch.ones(3)}, {"activation": "gelu"}, "no activation 'gelu'"),
        ("torch", {"running_mean": torch.ones(3), "running_var": torch.ones(3)}, {"rank": 7}, "rank must be"),
    ],
)
def test_what_is_wrong_is_said(library, values, settings, why):
    with pytest.raises(ValueError, match=why):
        bridges.read(library, values, **settings)


def test_what_cannot_be_written_is_refused():
    layer = bn.BatchNorm2d(3, activation="silu")
    with pytest.raises(ValueError, match="no activation"):
        bridges.write("keras", layer)
    with pytest.raises(ValueError, match="no activation 'silu'"):
        bridges.write("inplace_abn", layer)
    negative = bn.BatchNorm2d(3)
    nn.init.constant_(negative.weight, -1)
    with pytest.raises(ValueError, match=r"channels \[0, 1, 2\] is not above eps"):
        bridges.write("inplace_abn", negative)
    with pytest.raises(ValueError, match="running statistics"):
        bridges.write("keras", nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="average of all batches"):
        bridges.write("keras", nn.BatchNorm2d(3, momentum=None))
    with pytest.raises(ValueError, match="not Linear"):
        bridges.write("keras", nn.Linear(3, 3))


MUTATIONS = [
    Mutation(
        "bridges: Keras's momentum is the share of the new value",
        "bridges.py",
        "        layer.momentum = 1 - momentum if known.keeps else momentum",
        "        layer.momentum = momentum",
        "running statistics would follow each batch",
    ),
    Mutation(
        "bridges: a negative weight of inplace_abn stays",
        "bridges.py",
        ".abs() + eps",
        " + eps",
        "its sign would turn the output",
    ),
    Mutation(
        "bridges: Caffe's sums are taken for averages",
        "bridges.py",
        '    found = {"mean": mean * share, "variance": variance * share}',
        '    found = {"mean": mean, "variance": variance}',
        "they are a multiple of them",
    ),
]
