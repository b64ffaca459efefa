"""`batchnorm fold` and `batchnorm export`, on networks of torchvision, timm, the user's own, and trained here."""

import json

import pytest
import torch

from tests.command import batchnorm

pytest.importorskip("typer")
pytest.importorskip("torchvision")

NETS = """
import torch
from torch import nn

def block(width=4, act=nn.ReLU()):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), act)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = block()

    def forward(self, image, other):
        return self.block(image) + other.sum()

made = block()
nothing = dict
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of the user's, in the folder in which the command runs."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_network_of_torchvision_and_where_its_layers_went(here, tmp_path):
    pytest.importorskip("safetensors")
    done = here(
        "fold",
        "torchvision:resnet18",
        "--set",
        "num_classes=4",
        "--input",
        "2,3,64,64",
        "--out",
        "w.safetensors",
        cwd=tmp_path,
    )
    assert done.code == 0, done.error
    lines = done.out.splitlines()
    assert lines[0].split() == ["layer", "outcome", "into,", "or", "why", "not"]
    assert lines[1].split() == ["bn1", "folded", "conv1"]
    assert any(line.startswith("20 layers: 20 folded (traced; outputs differ by") for line in lines)
    assert "The weights are random" in done.error
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "w.safetensors")
    assert weights["fc.weight"].shape == (4, 512) and not any("bn" in name for name in weights)
    assert [each.name for each in tmp_path.iterdir()] == ["w.safetensors"]


def test_weights_of_a_file_and_json(here, tmp_path):
    from torchvision.models import resnet18

    model = resnet18(num_classes=4)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    done = here(
        "fold", "torchvision:resnet18", "--set", "num_classes=4", "--weights", "w.pth", "--input", "1,3,64,64",
        "--out", "folded.pt", "--json", cwd=tmp_path,
    )  # fmt: skip
    found = json.loads(done.out)
    assert (done.code, found["random_weights"], found["file"]) == (0, False, "folded.pt")
    assert found["layers"][0] == {"name": "bn1", "outcome": "folded", "what": "into conv1", "why": ""}
    assert found["fold_error"] < 1e-5 and found["known"] == "traced"
    folded = torch.load(tmp_path / "folded.pt", weights_only=True)
    expected = (
        model.conv1.weight
        * (model.bn1.weight / (model.bn1.running_var + model.bn1.eps).sqrt())[:, None, None, None]
    )
    torch.testing.assert_close(folded["conv1.weight"], expected.detach())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["resnet18"], "resnet18 is no folder of a run, and no torchvision:NAME, timm:NAME or package.module:FACTORY"),
        (["torchvision:resnet19"], "torchvision has no resnet19: did you mean resnet18"),
        (["timm:resnet19"], "timm has no resnet19: did you mean"),
        (["NETS:none"], "NETS has no none"),
        (["no_such_module:net"], "no_such_module cannot be imported: there is no module no_such_module"),
        (["NETS:nothing"], "NETS:nothing makes a dict, not a torch.nn.Module"),
        (["NETS:block", "--set", "width"], "--set width: write KEY=VALUE"),
        (["NETS:block", "--set", "depth=3"], "NETS:block cannot be made: block() got an unexpected keyword"),
        (["NETS:Net"], "NETS:Net takes no batch of one image"),
        (["NETS:block", "--input", "1,3,a,4"], "--input 1,3,a,4: write whole numbers"),
        (["NETS:block", "--input", "1,4,8,8"], "expected input[1, 4, 8, 8] to have 3 channels"),
        (["NETS:block", "--dtype", "int8"], "--dtype int8: choose float32"),
        (["NETS:block", "--weights", "none.pth"], "--weights 'none.pth': there is no such file"),
        (["NETS:block", "--weights", "code.pth"], "--weights 'code.pth' cannot be read as weights"),
        (["NETS:block", "--weights", "other.pth"], "--weights 'other.pth' are of another network"),
        (["NETS:block", "--out", "w.onnx"], "--out w.onnx: the name must end in .safetensors, .pt or .pth"),
        (["NETS:block", "--out", "none/w.pt"], "none"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(arguments, says, here, tmp_path, nets):
    pytest.importorskip("timm")
    torch.save({"a": print}, tmp_path / "code.pth")
    torch.save({"a": torch.ones(3)}, tmp_path / "other.pth")
    files = {each.name for each in tmp_path.iterdir()}
    done = here("fold", *[each.replace("NETS", nets) for each in arguments], cwd=tmp_path)
    assert done.code == 1 and done.out == ""
    assert done.error.startswith("error: ") and says.replace("NETS", nets) in done.error
    assert len(done.error.strip().splitlines()) == 1
    assert {each.name for each in tmp_path.iterdir() if each.name != "__pycache__"} == files


def test_the_user_s_own_code_with_two_inputs(here, tmp_path, nets):
    done = here("fold", f"{nets}:Net", "--input", "2,3,8,8", "--input", "5", cwd=tmp_path)
    assert done.code == 0 and "1 layer: 1 folded" in done.out
    done = here("export", f"{nets}:made", "--out", "net.pt2", "--input", "2,3,8,8", cwd=tmp_path)
    assert done.code == 0, done.error
    assert done.out.splitlines()[-1].startswith("net.pt2: pt2, 0.0 MB; outputs differ by")
    assert torch.export.load(tmp_path / "net.pt2").module()(torch.zeros(7, 3, 8, 8)).shape == (7, 4, 6, 6)


def test_an_export_that_is_not_right_leaves_no_file(here, tmp_path, nets):
    (tmp_path / "net.pt2").write_text("an older one")
    done = here(
        "export", f"{nets}:Net", "--out", "net.pt2", "--input", "2,3,8,8", "--input", "5", cwd=tmp_path
    )
    assert done.code == 1 and "no first dimension in common, the batch: pass dynamic=False" in done.error
    assert (tmp_path / "net.pt2").read_text() == "an older one"
    done = here(
        "export",
        f"{nets}:Net",
        "--out",
        "net.pt2",
        "--input",
        "2,3,8,8",
        "--input",
        "5",
        "--fixed",
        "--json",
        cwd=tmp_path,
    )
    found = json.loads(done.out)
    assert (found["format"], found["compared"], found["file"]) == ("pt2", [2], "net.pt2")
    assert found["bytes"] == (tmp_path / "net.pt2").stat().st_size


@pytest.mark.slow
def test_it_runs_as_a_user_calls_it(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("onnxruntime")
    done = batchnorm("export", "timm:repvgg_a0", "--out", "net.onnx", "--input", "1,3,64,64", cwd=tmp_path)
    assert done.code == 0, done.error
    assert "61 layers: 61 folded (traced;" in done.out
    assert [each.name for each in tmp_path.iterdir()] == ["net.onnx"]
    assert "Warning" not in done.error and "Traceback" not in done.error
