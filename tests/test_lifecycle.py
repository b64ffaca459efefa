"""`batchnorm insert`, `population` and `merge`, on networks of torchvision, timm, the user's own, and trained here."""

import json

import pytest
import torch
from torch import nn

import batchnorm as bn

pytest.importorskip("typer")
models = pytest.importorskip("torchvision").models

NETS = """
from torch import nn

def plain(width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.Dropout(0.4), nn.Flatten(), nn.LazyLinear(10)
    )

def normed(width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.4))
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of the user's, in the folder in which the command runs."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.fixture
def alexnet(tmp_path):
    torch.manual_seed(0)
    model = models.alexnet(num_classes=4)
    torch.save(model.state_dict(), tmp_path / "alexnet.pth")
    return model.eval()


SMALL = ("--set", "num_classes=4", "--input", "2,3,64,64")


def test_insert_shows_where_and_changes_no_file(here, tmp_path):
    done = here("insert", "torchvision:alexnet", *SMALL, cwd=tmp_path)
    assert done.code == 0, done.error
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["layer", "outcome", "what,", "or", "why", "not"]
    assert lines[1][:3] == ["features.0", "inserted", "BatchNorm2d(64),"]
    assert done.out.splitlines()[-1] == "10 layers: 7 inserted, 2 removed, 1 left alone"
    assert list(tmp_path.iterdir()) == []


def test_insert_of_a_trained_network_keeps_its_function(here, tmp_path, alexnet):
    pytest.importorskip("safetensors")
    options = ("--weights", "alexnet.pth", "--data", "mnist-10k", "--images", "40", "--out", "bn.safetensors")
    done = here("insert", "torchvision:alexnet", *SMALL, *options, cwd=tmp_path)
    assert done.code == 0, done.error
    from safetensors.torch import load_file

    model, _ = bn.insert(models.alexnet(num_classes=4), torch.randn(2, 3, 64, 64))
    model.load_state_dict(load_file(tmp_path / "bn.safetensors"))
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), alexnet(x), rtol=1e-3, atol=1e-5)


def test_insert_says_what_is_wrong(here, tmp_path, alexnet):
    for arguments, why in (
        (("--where", "layer9"), "where='layer9' is no module"),
        (("--dropout", "some"), "--dropout some: write drop, keep or a probability"),
        (("--dropout", "2"), "dropout must be"),
        (("--out", "a.txt"), "must end in .safetensors"),
        (("--out", "nowhere/a.pt"), "there is no folder nowhere"),
        (("--data", "nowhere"), "no data set 'nowhere'"),
    ):
        done = here("insert", "torchvision:alexnet", *SMALL, *arguments, cwd=tmp_path)
        assert done.code == 1 and why in done.error and len(done.error.splitlines()) == 1


def test_insert_for_scripts(here, tmp_path):
    options = ("--where", "features.0", "--dropout", "0.1", "--json")
    done = here("insert", "torchvision:alexnet", *SMALL, *options, cwd=tmp_path)
    said = json.loads(done.out)
    outcomes = {each["name"]: each["outcome"] for each in said["layers"]}
    assert outcomes["features.0"] == "inserted" and outcomes["classifier.0"] == "weakened"
    assert said["random_weights"] is True and said["file"] is None


def test_population_measures_what_the_images_say(here, tmp_path, nets):
    options = (
        "--data",
        "mnist-10k",
        "--images",
        "500",
        "--size",
        "28",
        "--out",
        "m.pt",
        "--estimator",
        "pooled",
    )
    done = here("population", f"{nets}:normed", "--input", "2,1,28,28", *options, "--json", cwd=tmp_path)
    assert done.code == 0, done.error
    said = json.loads(done.out)
    assert said["batches"] == 8 and said["layers"][0]["outcome"] == "measured"
    assert said["errors"]["1"] < 0.1
    state = torch.load(tmp_path / "m.pt")

    from batchnorm.data.catalogue import load
    from batchnorm.data.subset import Subset

    chosen = Subset(load("mnist-10k", "train"), 500)
    images = torch.stack([chosen[each][0] for each in range(500)]).float() / 255
    values = nn.functional.conv2d((images - 0.5) / 0.5, state["0.weight"], state["0.bias"]).double()
    torch.testing.assert_close(state["1.running_mean"].double(), values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["1.running_var"].double(), values.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_population_shows_a_row_for_each_layer(here, tmp_path):
    options = (
        "--data",
        "mnist-10k",
        "--images",
        "64",
        "--size",
        "32",
        "--batch-size",
        "16",
        "--tolerance",
        "9",
    )
    done = here("population", "torchvision:resnet18", *options, cwd=tmp_path)
    assert done.code == 0, done.error
    assert done.out.splitlines()[-1].startswith("20 layers: 20 measured (4 batches, standard error")
    assert "The weights are random" in done.error


def test_population_says_what_is_wrong(here, tmp_path, nets):
    for arguments, why in (
        (("torchvision:alexnet", "--data", "mnist-10k"), "no layer whose statistics could be measured"),
        (("torchvision:resnet18", "--data", "nowhere"), "no data set"),
        (
            ("torchvision:resnet18", "--data", "mnist-10k", "--mean", "a"),
            "--mean a: write one number or three",
        ),
        (("torchvision:resnet18", "--data", "mnist-10k", "--std", "0"), "--std 0: write"),
        (("torchvision:resnet18", "--data", "mnist-10k", "--estimator", "mine"), "choose paper or pooled"),
    ):
        done = here("population", *arguments, cwd=tmp_path)
        assert done.code == 1 and why in done.error, done


def test_merge_is_the_law_of_total_variance(here, tmp_path):
    def state(mean, variance):
        return {
            "0.weight": torch.ones(2),
            "0.running_mean": torch.full((2,), mean),
            "0.running_var": torch.full((2,), variance),
        }

    torch.save(state(-1.0, 0.5), tmp_path / "a.pt")
    torch.save({"model": state(1.0, 0.5)}, tmp_path / "b.pt")
    done = here("merge", "a.pt:300", "b.pt:100", "--out", "merged.pt", cwd=tmp_path)
    assert done.code == 0, done.error
    merged = torch.load(tmp_path / "merged.pt")
    assert merged["0.running_mean"].tolist() == [-0.5, -0.5]
    assert merged["0.running_var"].tolist() == [1.25, 1.25]  # 0.5 within, 0.75 between
    assert done.out.splitlines()[1].split() == ["0", "60.0%"]
    said = json.loads(here("merge", "a.pt", "b.pt", "--out", "m.pt", "--json", cwd=tmp_path).out)
    assert said["layers"] == [{"layer": "0", "between": pytest.approx(2 / 3)}]


def test_merge_says_what_is_wrong(here, tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(b"nothing")
    for arguments, why in (
        (("a.pt", "b.pt"), '"mean" averages'),
        (("a.pt", "c.pt"), "cannot be read as weights"),
        (("a.pt", "d.pt"), "there is no such file"),
        (("a.pt:-1", "b.pt"), "a weight is a positive number"),
    ):
        done = here("merge", *arguments, "--out", "x.pt", cwd=tmp_path)
        assert done.code == 1 and why in done.error, done
        assert not (tmp_path / "x.pt").exists()
    done = here("merge", "a.pt:1", "b.pt:3", "--parameters", "mean", "--out", "x.pt", cwd=tmp_path)
    assert torch.load(tmp_path / "x.pt")["w"].tolist() == [0.25, 0.25]
