"""`batchnorm examine` and `explain`, on networks of torchvision, timm and the user's own."""

import json
import re

import pytest
import torch
from torch import nn

import batchnorm as bn

pytest.importorskip("typer")
models = pytest.importorskip("torchvision").models

NETS = """
import torch
from torch import nn

def right(width=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
    )

def wrong():
    model = right()
    model[1].momentum = 0.99
    model[4].momentum = 0
    return model
"""
DATA = ("--data", "mnist-10k", "--images", 96, "--size", 28, "--batch-size", 24)


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of the user's, in the folder in which the command runs."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.fixture
def weights(tmp_path):
    """Of the user's network, with statistics that are not those of the data."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    state = nn.Sequential(*layers).state_dict()
    state["4.running_mean"] += 5
    state["1.running_mean"] -= 7
    torch.save(state, tmp_path / "w.pth")
    return "w.pth"


def test_a_new_network_has_nothing_serious(here, tmp_path):
    done = here("examine", "torchvision:resnet18", "--set", "num_classes=4", cwd=tmp_path)
    assert done.code == 0, done.error
    assert "BN206" in done.out and "no batch was seen yet" in done.out
    assert done.out.splitlines()[-1] == "1 info; 22 checks not made"
    assert "The weights are random" in done.error
    assert list(tmp_path.iterdir()) == []


def test_findings_and_the_exit_status(here, tmp_path, nets):
    done = here("examine", f"{nets}:wrong", cwd=tmp_path)
    assert done.code == 1
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[0] == ["code", "severity", "layer", "finding"]
    assert rows[1][:3] == ["BN201", "warning", "1"]
    assert '→ bn.configure(model, momentum=0.01, only="1")' in " ".join(done.out.split())
    for options, code in (
        (("--fail-on", "error"), 0),
        (("--fail-on", "never"), 0),
        (("--ignore", "BN201"), 0),
        (("--select", "BN1"), 0),
        (("--select", "momentum"), 1),
    ):
        assert here("examine", f"{nets}:wrong", *options, cwd=tmp_path).code == code
    for arguments, says in (
        (("examine", "nowhere:model"), "nowhere cannot be imported"),
        (("examine", f"{nets}:wrong", "--select", "BN9"), "there is no check 'BN9'"),
        (
            ("examine", f"{nets}:wrong", "--format", "xml"),
            "--format xml: choose text or json or sarif or github",
        ),
        (("examine", f"{nets}:wrong", "--use", "sleep"), "use must be one of training"),
        (
            ("examine", f"{nets}:wrong", "--out", "w.pt"),
            "--out writes the weights of a network that was mended",
        ),
        (("examine", f"{nets}:wrong", "--report", "page.pdf"), "write a page, NAME.html"),
        (("examine", f"{nets}:wrong", "--data", "nothing-there"), "nothing-there"),
    ):
        done = here(*arguments, cwd=tmp_path)
        assert done.code == 2 and says in done.error, (arguments, done.error)


def test_weights_and_data_and_mending(here, tmp_path, nets, weights):
    pytest.importorskip("safetensors")
    name = f"{nets}:right"
    done = here("examine", name, "--weights", weights, *DATA, cwd=tmp_path)
    assert done.code == 1 and "4 batches" not in done.error
    found = [line.split()[:3] for line in done.out.splitlines() if line.startswith("BN")]
    assert found == [["BN405", "warning", "1"], ["BN405", "warning", "4"]]
    options = ("--fix", "--out", "mended.safetensors", "--report", "page.html")
    done = here("examine", name, "--weights", weights, *DATA, *options, cwd=tmp_path)
    assert done.code == 0, done.error
    assert "fixed BN405 1: running statistics → those of 96 examples in 4 batches" in done.out
    assert "page.html" in done.error and "mended.safetensors: " in done.error
    assert "fixed" in (tmp_path / "page.html").read_text()
    again = here("examine", name, "--weights", "mended.safetensors", *DATA, cwd=tmp_path)
    assert again.code == 0 and "BN2" not in again.out.split("not made")[0]


@pytest.mark.parametrize("kind", ["json", "sarif", "github"])
def test_formats_for_machines(here, tmp_path, nets, kind):
    done = here("examine", f"{nets}:wrong", "--format", kind, cwd=tmp_path)
    assert done.code == 1
    if kind == "github":
        assert done.out.startswith("::warning title=BN201 momentum::1: momentum is 0.99")
        return
    told = json.loads(done.out)
    if kind == "json":
        assert [(each["code"], each["layer"]) for each in told["findings"]][:2] == [
            ("BN201", "1"),
            ("BN201", "4"),
        ]
        assert told["layers"][0]["kind"] == "BatchNorm2d(4)" and told["skipped"]["BN405"]
        assert json.loads(here("examine", f"{nets}:wrong", "--json", cwd=tmp_path).out) == told
    else:
        results = told["runs"][0]["results"]
        assert [each["ruleId"] for each in results][:2] == ["BN201", "BN201"]


def test_what_pyproject_leaves_out(here, tmp_path, nets):
    project = tmp_path / "pyproject.toml"
    name = f"{nets}:wrong"
    for text, code in (
        ('ignore = ["BN201"]', 0),
        ('ignore = {"4" = ["BN201"]}', 1),
        ('ignore = {"?" = ["BN201"]}', 0),
        ('select = ["BN1"]', 0),
    ):
        project.write_text(f"[tool.batchnorm]\n{text}\n")
        assert here("examine", name, cwd=tmp_path).code == code, text
    inner = tmp_path / "inner"
    inner.mkdir()
    assert here("examine", name, cwd=inner).code == 0  # the nearest above
    assert here("examine", name, "--select", "BN2", cwd=tmp_path).code == 1
    for text in ('ignore = "BN201"', 'ignore = {"4" = "BN201"}', "ignore = [1]", "ignore = ["):
        project.write_text(f"[tool.batchnorm]\n{text}\n")
        done = here("examine", name, cwd=tmp_path)
        assert done.code == 2 and "pyproject.toml" in done.error, done.error


def test_explain(here, tmp_path):
    done = here("explain", "BN405", cwd=tmp_path)
    assert done.code == 0 and done.out.startswith("BN405 stale-statistics (warning)")
    assert "algorithm 2, line 10" in " ".join(done.out.split()) and "mends it" in done.out
    assert here("explain", "stale-statistics", cwd=tmp_path).out == done.out
    assert len(re.findall("^source ", here("explain", "BN4", cwd=tmp_path).out, re.MULTILINE)) == 10
    done = here("explain", "BN999", cwd=tmp_path)
    assert done.code == 1 and "there is no check 'BN999'" in done.error


def test_findings_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.99))
    found = bn.examine(model, torch.randn(64, 4).split(16))
    for name in ("page.html", "found.json", "found.sarif", "found.txt"):
        found.save(tmp_path / name, "mine")
        assert "BN201" in (tmp_path / name).read_text()
    assert json.loads((tmp_path / "found.json").read_text())["model"] == "mine"
    with pytest.raises(ValueError, match="the suffix says what is written"):
        found.save(tmp_path / "found.pdf")
    assert len(list(tmp_path.iterdir())) == 4
