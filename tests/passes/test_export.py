"""What is exported computes what the model does, or there is no file."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import batchnorm as bn
from tests.mutations.mutation import Mutation
from tests.passes.compare import unlike
from tests.passes.test_fold import Odd, conv

FORMATS = ["onnx", "pt2", "safetensors"]
X = torch.randn(2, 6, 8, 8)


def network(activation="relu"):
    layers = [
        conv(),
        bn.BatchNorm2d(6, activation=activation),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(6),
        nn.Sigmoid(),
    ]
    return unlike(nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 4), nn.BatchNorm1d(4)))


def needed(format):
    for package in {"onnx": ("onnx", "onnxruntime", "onnxscript"), "safetensors": ("safetensors",)}.get(
        format, ()
    ):
        pytest.importorskip(package)


def of_onnx(path, *inputs):
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return names, [each.name for each in session.get_outputs()], session.run(None, given)


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_computes_what_the_model_does(format, tmp_path):
    needed(format)
    model = network().train()
    state = {name: values.clone() for name, values in model.state_dict().items()}
    path = tmp_path / f"model.{format}"
    path.write_text("an older one")
    report = bn.export(model, path, X)
    assert model.training
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    assert report.compared == (2, 3) and report.error < 1e-6 and report.size == path.stat().st_size
    assert report.folded.summary.startswith("3 layers: 2 folded, 1 affine")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    more = torch.randn(5, 6, 8, 8)
    expected = model.eval()(more).detach()
    if format == "onnx":
        inputs, outputs, (found,) = of_onnx(path, more)
        assert (inputs, outputs) == (["input"], ["output"])
        found = torch.from_numpy(found)
        graph = pytest.importorskip("onnx").load(path).graph
        (left,) = (
            node for node in graph.node if node.op_type == "BatchNormalization"
        )  # the one that is affine
        assert not [each.i for each in left.attribute if each.name == "training_mode" and each.i]
    elif format == "pt2":
        found = torch.export.load(path).module()(more)
    else:
        weights = pytest.importorskip("safetensors.torch").load_file(path)
        folded, _ = bn.fold(network(), X)
        folded.load_state_dict(weights)
        found = folded(more)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(6)

    def forward(self, image, mask):
        y = self.norm(self.conv(image)) * mask
        return y.relu(), y.mean((2, 3))


def test_inputs_and_outputs_have_names(tmp_path):
    needed("onnx")
    model = unlike(Two()).eval()
    mask = torch.rand(2, 1, 8, 8)
    bn.export(model, tmp_path / "two.onnx", X, mask, opset=18)
    inputs, outputs, found = of_onnx(tmp_path / "two.onnx", X, mask)
    assert (inputs, outputs) == (["image", "mask"], ["output_0", "output_1"])
    for one, two in zip(found, model(X, mask), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), two.detach(), rtol=1e-4, atol=1e-5)
    assert pytest.importorskip("onnx").load(tmp_path / "two.onnx").opset_import[0].version == 18


def for_two(m, x):
    return m.bn(m.a(x)) if x.size(0) == 2 else x


def by_value(m, x):
    return m.bn(m.a(x)) + torch.tensor(x.detach().tolist()).mean()


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize(
    ("forward", "says"), [(for_two, r"for one size of the batch .*: pass dynamic=False"), (by_value, ".")]
)
def test_what_cannot_be_exported_leaves_no_file(forward, says, format, tmp_path):
    needed(format)
    model = unlike(Odd(forward, a=conv(), bn=nn.BatchNorm2d(6)))
    path = tmp_path / f"model.{format}"
    path.write_text("an older one")
    with pytest.raises(Exception, match=says):
        bn.export(model, path, X)
    assert path.read_text() == "an older one" and [each.name for each in tmp_path.iterdir()] == [path.name]


def test_for_one_size_of_the_batch(tmp_path):
    model = unlike(Odd(for_two, a=conv(), bn=nn.BatchNorm2d(6)))
    report = bn.export(model, tmp_path / "model.pt2", X, dynamic=False)
    assert report.compared == (2,)
    assert str(report).endswith("of the largest, with batches of 2")


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    """A runtime with a fault, as it comes: here, one that adds to the outputs."""
    program = torch.export.ExportedProgram.module

    def faulty(self, *arguments, **options):
        class Faulty(nn.Module):
            def forward(self, *inputs):
                return module(*inputs) + 1

        module = program(self, *arguments, **options)
        return Faulty()

    monkeypatch.setattr(torch.export.ExportedProgram, "module", faulty)
    with pytest.raises(ValueError, match=r"what was written differ from the model's by .*, for a batch of 2"):
        bn.export(network(), tmp_path / "model.pt2", X)
    assert not [*tmp_path.iterdir()]


def test_a_layer_that_normalizes_by_the_batch_is_named(tmp_path):
    model = nn.Sequential(conv(), nn.BatchNorm2d(6, track_running_stats=False))
    with pytest.raises(ValueError, match=r"^1 would normalize by the batch wherever the file runs"):
        bn.export(model, tmp_path / "model.pt2", X)
    assert not [*tmp_path.iterdir()]


def test_wrong_calls_say_what_is_wanted(tmp_path):
    for path, inputs, says in (
        (tmp_path / "model.bin", [X], r"no suffix \.onnx, \.pt2 or \.safetensors"),
        (tmp_path / "model.pt2", [], "needs example inputs"),
        (tmp_path / "model.pt2", [[X]], "needs example inputs"),
        (tmp_path / "none" / "model.pt2", [X], "there is no folder"),
        (tmp_path / "model.pt2", [X, torch.randn(8)], "no first dimension in common"),
    ):
        with pytest.raises(ValueError, match=says):
            bn.export(Two() if len(inputs) == 2 else network(), path, *inputs)
    assert not [*tmp_path.iterdir()]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    needed("safetensors")
    if "onnx" in sys.modules or pytest.importorskip("onnx"):
        with pytest.raises(
            ModuleNotFoundError, match=r"needs onnxscript, which is not installed: pip install .*onnx"
        ):
            bn.export(network(), tmp_path / "model.onnx", X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, tmp_path):
    x = X.to(dtype)
    model = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU())
    report = bn.export(unlike(model).to(dtype), tmp_path / "model.pt2", x)
    assert report.folded.count("folded") == 1
    assert torch.export.load(tmp_path / "model.pt2").module()(x).dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm/levit_128s", "timm/repvgg_a0"])
def test_real_networks(name, tmp_path):
    needed("onnx")
    if name.startswith("timm/"):
        model = pytest.importorskip("timm").create_model(name.removeprefix("timm/"), num_classes=10)
    else:
        model = pytest.importorskip("torchvision").models.get_model(name, weights=None, num_classes=10)
    x = torch.randn(1, 3, 224 if "levit" in name else 64, 224 if "levit" in name else 64)
    report = bn.export(unlike(model), tmp_path / "model.onnx", x)
    assert report.compared == (1, 2)
    _, _, (found,) = of_onnx(tmp_path / "model.onnx", torch.cat([x, x, x]))
    torch.testing.assert_close(torch.from_numpy(found[:1]), model.eval()(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_program_runs_where_this_library_is_not(tmp_path):
    bn.export(network("tanh"), tmp_path / "model.pt2", X)
    script = (
        "import sys; sys.modules['batchnorm'] = None\n"
        "import torch; print(torch.export.load(sys.argv[1]).module()(torch.zeros(7, 6, 8, 8)).shape)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "model.pt2")]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout == "torch.Size([7, 4])\n"
    )


MUTATIONS = [
    Mutation(
        "outputs not compared", "passes/export.py",
        "        if not error <= tolerance:", "        if False:",
        "a file that computes something else would be kept",
    ),
    Mutation(
        "written at its place", "atomic_file.py",
        "        unfinished.unlink(missing_ok=True)\n", "        unfinished.replace(path)\n",
        "whoever has an older file loses it to a wrong one",
    ),
]  # fmt: skip
