"""Networks that cannot be trained on images of this size, or are none: said before anything is written."""

import sys

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.training import toml
from batchnorm.training.network import NetworkError, _expect_size, build
from tests.command import in_this_process

pytest.importorskip("torchvision", reason="the networks are torchvision's")


def settings(name, size):
    return toml.parse({"training": {"steps": 1}, "model": {"name": name}, "data": {"image_size": size}})


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("vit_b_16", 64, "vit_b_16 does not take images of data.image_size = 64: Wrong image height"),
        ("inception_v3", 64, "inception_v3 does not take images of data.image_size = 64: .*Kernel size"),
        ("alexnet", 32, "alexnet does not take images of data.image_size = 32: .*too small"),
        ("resnet19", 64, "'resnet19' is no model: did you mean resnet18"),
        ("fcn_resnet50", 64, "'fcn_resnet50' is a model of torchvision, but none that classifies images"),
        ("xyz", 64, "'xyz' is no model: take bn-inception, or one of torchvision's"),
    ],
)
def test_what_does_not_fit_is_one_line(name, size, says):
    with pytest.raises(NetworkError, match=says) as caught:
        build(settings(name, size), 10, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("ResNet18", 8), ("bn-inception", 64)])
def test_what_fits_is_as_it_would_be_without_the_question(name, size):
    network = build(settings(name, size), 10, 3)
    assert network.training
    assert not any(values.is_meta for values in network.state_dict().values())
    counts = [values for key, values in network.state_dict().items() if key.endswith("num_batches_tracked")]
    assert counts and not any(map(bool, counts))


def test_no_folder_is_made(tmp_path):
    (tmp_path / "run.toml").write_text('[model]\nname = "resnet19"\n[training]\nsteps = 1\n')
    done = in_this_process("train", tmp_path / "run.toml", "--out", tmp_path / "run")
    assert done.code == 1 and "did you mean resnet18" in done.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("timm/resnet18", 1, 32),
        ("resnet10t", 3, 32),  # which torchvision does not have
        ("vit_tiny_patch16_224", 3, 64),  # made for the size that is asked for
        ("resnet18.a1_in1k", 3, 32),
    ],
)
def test_of_timm(name, channels, size):
    pytest.importorskip("timm")
    network = build(settings(name, size), 7, channels)
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 7)
    batch_norms = [each for each in network.modules() if isinstance(each, nn.BatchNorm2d)]
    assert all(isinstance(each, bn.BatchNorm2d) for each in batch_norms)


def test_a_misspelt_model_of_timm_is_suggested_as_timm_s():
    pytest.importorskip("timm")
    with pytest.raises(NetworkError, match=r"did you mean timm/resnet1\d"):
        build(settings("timm/resnet19", 32), 10, 3)


def test_dropout_is_the_library_s_own_argument():
    pytest.importorskip("timm")
    config = toml.parse({"training": {"steps": 1}, "model": {"name": "timm/resnet18", "dropout": 0.3}})
    assert build(config, 7, 3).drop_rate == 0.3
    with pytest.raises(NetworkError, match="dropout"):
        build(toml.parse({"training": {"steps": 1}, "model": {"name": "resnet18", "dropout": 0.3}}), 7, 3)


def test_without_timm_its_models_are_no_models(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(NetworkError, match=r"no model: .*; for timm's: pip install timm"):
        build(settings("timm/zzzzzz", 32), 10, 3)


def test_a_forward_that_makes_tensors_of_its_own_is_no_network_of_another_size():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x):
            return self.linear(x.mean((2, 3)) + torch.zeros(2, 3))  # on the CPU

    _expect_size(Own(), settings("resnet18", 32), 3)
