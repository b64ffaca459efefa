"""Weights to start from: real files, as torchvision's and timm's scripts, DDP and our runs write them."""

import argparse
import copy

import pytest
import torch
from torch import nn

from batchnorm.training import checkpoint, toml
from batchnorm.training.network import NetworkError, build
from batchnorm.training.weights import load
from tests.mutations.mutation import Mutation

torchvision = pytest.importorskip("torchvision", reason="the networks are torchvision's")


def network(name="resnet18", classes=4, seed=0):
    config = toml.parse(
        {"training": {"steps": 1, "seed": seed}, "model": {"name": name}, "data": {"image_size": 64}}
    )
    return build(config, classes, 3)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(5)
    model = torchvision.models.resnet18(num_classes=1000)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.get_buffer("running_mean"))
    return model


def saved(state, path):
    torch.save(state, path)
    return path


FORMATS = {
    "torchvision's file": lambda model: model.state_dict(),
    "torchvision's script": lambda model: {
        "model": model.state_dict(), "optimizer": {}, "epoch": 3, "args": argparse.Namespace(lr=0.1),
    },
    "timm's script": lambda model: {
        "epoch": 3, "arch": "resnet18", "state_dict": model.state_dict(), "optimizer": {}, "version": 2,
        "args": argparse.Namespace(model="resnet18"), "metric": 71.5,
    },
    "DDP's names": lambda model: {f"module.{name}": values for name, values in model.state_dict().items()},
    "compiled and wrapped": lambda model: {
        "state_dict": {f"model._orig_mod.{name}": values for name, values in model.state_dict().items()}
    },
    "without counters": lambda model: {
        name: values for name, values in model.state_dict().items() if "tracked" not in name
    },
    "Lightning's, with a loss": lambda model: {
        "state_dict": {
            "criterion.weight": torch.ones(1000),
            **{f"net.{name}": values for name, values in model.state_dict().items()},
        }
    },
    "an average of weights": lambda model: torch.optim.swa_utils.AveragedModel(model).state_dict(),
    "half": lambda model: copy.deepcopy(model).half().state_dict(),
}  # fmt: skip


@pytest.mark.parametrize("how", FORMATS)
def test_every_format_gives_the_same_weights_and_a_new_head(how, theirs, tmp_path):
    own = network()
    head = own.fc.weight.clone()
    new = load(own, saved(FORMATS[how](theirs), tmp_path / "w.pth"), 4)
    assert [line.split(",")[0] for line in new] == ["fc.weight", "fc.bias"]
    assert "1,000 classes" in new[0]
    assert torch.equal(own.fc.weight, head)
    tolerance = 1e-3 if how == "half" else 0
    for name, values in theirs.state_dict().items():
        if not name.startswith("fc.") and "tracked" not in name:
            torch.testing.assert_close(own.state_dict()[name], values, rtol=tolerance, atol=tolerance)


def test_the_old_format_of_torch_and_safetensors_too(theirs, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.save(theirs.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.save_file(theirs.state_dict(), tmp_path / "new.safetensors")
    for name in ("old.pth", "new.safetensors"):
        own = network(classes=1000)
        assert load(own, tmp_path / name, 1000) == []  # the head is the file's
        assert torch.equal(own.fc.weight, theirs.fc.weight)


def test_a_network_of_ours_and_a_broken_one(tmp_path):
    first, second = network(seed=1), network(seed=2)
    checkpoint.save({"config": {}, "population": first.state_dict(), "moving": {}}, tmp_path / "best.pt")
    assert load(second, tmp_path / "best.pt", 4) == []
    assert torch.equal(first.fc.weight, second.fc.weight)
    content = bytearray((tmp_path / "best.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "best.pt").write_bytes(content)
    with pytest.raises(NetworkError, match=r"best\.pt' cannot be read as weights: it is broken, or"):
        load(second, tmp_path / "best.pt", 4)


class Code:
    def __reduce__(self):
        return print, ("executed",)


def within_itself():
    state: dict[str, object] = {}
    state["model"] = state
    return state


REFUSED = {
    "of another network": (lambda model: torchvision.models.resnet34().state_dict(), "layer1.2.conv1.weight is not"),
    "wider": (lambda model: torchvision.models.wide_resnet50_2().state_dict(), "conv1.weight is"),
    "less": (lambda model: dict(list(model.state_dict().items())[5:]), "conv1.weight is missing"),
    "of grey images": (
        lambda model: {**model.state_dict(), "conv1.weight": torch.zeros(64, 1, 7, 7)},
        "conv1.weight is 64×1×7×7, not 64×3×7×7",
    ),
    "heads that disagree": (
        lambda model: {**model.state_dict(), "fc.bias": torch.zeros(7)}, "fc.weight is 1000×512, not 4×512",
    ),
    "nan": (
        lambda model: {**model.state_dict(), "bn1.weight": torch.full((64,), torch.nan)},
        "bn1.weight is not finite",
    ),
    "sparse": (
        lambda model: {**model.state_dict(), "bn1.weight": torch.ones(64).to_sparse()},
        "bn1.weight is no plain tensor",
    ),
    "quantized": (
        lambda model: {
            **model.state_dict(), "bn1.weight": torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8),
        },
        "bn1.weight is no plain tensor",
    ),
    "complex": (lambda model: {**model.state_dict(), "bn1.bias": torch.ones(64) * 1j}, "bn1.bias is no plain tensor"),
    "integers": (
        lambda model: {**model.state_dict(), "bn1.bias": torch.ones(64).long()}, "bn1.bias is int64, not float32",
    ),
    "negative variance": (
        lambda model: {**model.state_dict(), "bn1.running_var": -torch.ones(64)}, "bn1.running_var is negative",
    ),
    "a bias of another head": (
        lambda model: {**model.state_dict(), "fc.weight": torch.zeros(4, 512), "fc.bias": torch.zeros(5)},
        "fc.bias is 5, not 4",
    ),
    "within itself": (lambda model: within_itself(), "holds no state_dict"),
    "a terabyte of nothing": (
        lambda model: {**model.state_dict(), "fc.weight": torch.zeros(1).expand(10**12)},
        "fc.weight is 1000000000000, not 4×512",
    ),
    "no tensors": (lambda model: {"epoch": 3}, "holds no state_dict"),
    "nothing": (lambda model: {}, "holds no state_dict"),
    "a list": (lambda model: [1, 2], "cannot be read as weights"),
    "code": (lambda model: {"state_dict": Code()}, "cannot be read as weights"),
    "a whole model": (lambda model: model, "cannot be read as weights"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch's about quantized and sparse tensors
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_one_line_and_changes_nothing(what, theirs, tmp_path, capsys):
    make, says = REFUSED[what]
    own = network()
    before = copy.deepcopy(own.state_dict())
    with pytest.raises(NetworkError) as caught:
        load(own, saved(make(theirs), tmp_path / "w.pth"), 4)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(values, before[name]) for name, values in own.state_dict().items())
    assert "executed" not in capsys.readouterr().out


def test_what_is_narrower_and_no_head_is_another_network(theirs, tmp_path):
    state = {**theirs.state_dict(), "bn1.bias": torch.zeros(32)}
    with pytest.raises(NetworkError, match=r"bn1\.bias is 32, not 64"):
        load(network(classes=1000), saved(state, tmp_path / "w.pth"), 1000)


@pytest.mark.parametrize(
    ("name", "content"), [("absent.pth", None), ("text.pth", b"x" * 99), ("w.safetensors", b"{}")]
)
def test_no_file_of_weights(name, content, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(NetworkError, match=r"no such file|cannot be read as weights"):
        load(network(), tmp_path / name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet", "mobilenet_v3_small"])
def test_heads_of_other_kinds(name, tmp_path):
    """A convolution, several of them, one of two linear layers."""
    options = {"init_weights": False} if name == "googlenet" else {}
    theirs = torchvision.models.get_model(name, num_classes=1000, **options)
    new = load(network(name), saved(theirs.state_dict(), tmp_path / "w.pth"), 4)
    assert len(new) == (6 if name == "googlenet" else 2)


def test_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=1000)
    own = network("timm/mobilenetv3_small_050")
    new = load(own, saved(theirs.state_dict(), tmp_path / "w.pth"), 4)
    assert [line.split(",")[0] for line in new] == ["classifier.weight", "classifier.bias"]
    assert torch.equal(own.conv_stem.weight, theirs.conv_stem.weight)


MUTATIONS = [
    Mutation(
        "any weights of another shape are left out", "training/weights.py",
        "and own.size(0) == classes != found.size(0)", "and own.shape != found.shape",
        "a network would start half from a file of another one",
    ),
]  # fmt: skip
