"""torch.export of layers and upgraded models: torch's own operators alone, which run where batchnorm is not."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from tests.interop.graphs import exported, foreign, operators, same_as
from tests.mutations.mutation import Mutation
from tests.passes.compare import unlike

BATCH_NORM = "aten.batch_norm.default"
LAYERS = {
    "plain": lambda: bn.BatchNorm2d(3),
    "activation": lambda: bn.BatchNorm2d(3, activation="silu"),
    "module": lambda: bn.BatchNorm2d(3, activation=nn.PReLU()),
    "no affine": lambda: bn.BatchNorm2d(3, affine=False),
    "no bias": lambda: bn.BatchNorm2d(3, bias=False),
    "cumulative": lambda: bn.BatchNorm2d(3, momentum=None),
    "debiased": lambda: bn.BatchNorm2d(3, debiased=True),
    "momentum 0": lambda: bn.BatchNorm2d(3, momentum=0.0),
    "no statistics": lambda: bn.BatchNorm2d(3, track_running_stats=False),
    "on_single": lambda: bn.BatchNorm2d(3, on_single="running"),
    "Population": lambda: bn.BatchNorm2d(3, statistics=bn.Population()),
    "Sync": lambda: bn.BatchNorm2d(3, statistics=bn.Sync()),
    "Ghost": lambda: bn.BatchNorm2d(3, statistics=bn.Ghost(2)),
    "Ghost of more": lambda: bn.BatchNorm2d(3, statistics=bn.Ghost(4)),
    "Renorm": lambda: bn.BatchNorm2d(3, statistics=bn.Renorm(1.1, 0.2)),
    "Ramp": lambda: bn.BatchNorm2d(3, statistics=bn.Renorm(bn.Ramp(1, 3, 0, 4))),
    "per activation": lambda: bn.BatchNorm((3, 5, 5)),
}
# whose operator has the running statistics for arguments
MOVABLE = [
    name for name in LAYERS if name not in ("no statistics", "Ghost", "Ghost of more", "Renorm", "Ramp")
]


def images(samples=6):
    return torch.randn(samples, 3, 5, 5) * 2 + 1


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = bn.BatchNorm2d(3, activation="relu")

    def forward(self, x, residual, mask=None):
        return self.norm(x, residual, mask)


each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
each_capture = pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["non-strict", "strict"]
)


@each_capture
@each_mode
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_torch_s_operators(name, training, strict):
    layer = unlike(LAYERS[name]()).train(training)
    program = exported(layer, images(), strict=strict)
    assert foreign(program) == []
    same_as(program.module(), layer, images(9))


@pytest.mark.parametrize("name", LAYERS)
def test_for_one_size_of_batches(name):
    layer = unlike(LAYERS[name]())
    program = exported(layer, images(), dynamic=False)
    assert foreign(program) == []
    same_as(program.module(), layer, images())


@each_capture
@pytest.mark.parametrize("name", LAYERS)
def test_in_evaluation_it_is_one_of_them(name, strict):
    layer = LAYERS[name]().eval()
    layer.activation = None
    found = operators(exported(layer, images(), strict=strict))
    assert found[BATCH_NORM] == 1
    assert name == "per activation" or sum(found.values()) == 1


@each_capture
def test_in_training_it_is_what_torch_s_layer_is(strict):
    ours, theirs = (
        operators(exported(make(3), images(), strict=strict)) for make in (bn.BatchNorm2d, nn.BatchNorm2d)
    )
    assert ours == theirs


@each_capture
@each_mode
@pytest.mark.parametrize(
    "statistics", [None, bn.Ghost(2), bn.Renorm(), bn.Population(), bn.Sync()], ids=lambda each: repr(each)
)
@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "mask"])
def test_with_a_mask(lengths, statistics, training, strict):
    layer = unlike(bn.BatchNorm1d(3, statistics=statistics, activation="tanh")).train(training)

    def given(samples):
        mask = torch.randint(2, 8, (samples,)) if lengths else torch.rand(samples, 1, 7) > 0.4
        return torch.randn(samples, 3, 7), None, mask

    program = exported(layer, *given(6), strict=strict)
    assert foreign(program) == []
    same_as(program.module(), layer, *given(9))


@each_capture
@each_mode
def test_with_a_residual(training, strict):
    model = Residual().train(training)
    program = exported(model, images(), images(), strict=strict)
    assert foreign(program) == []
    same_as(program.module(), model, images(9), images(9))


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float64", "float32")]
)
@each_mode
def test_in_other_dtypes(dtypes, training):
    of_input, of_layer = (getattr(torch, name) for name in dtypes)
    layer = bn.BatchNorm2d(3, dtype=of_layer).train(training)
    program = exported(layer, images().to(of_input))
    assert foreign(program) == []
    same_as(
        program.module(), layer, images(9).to(of_input), tolerance=2e-2 if of_input != torch.float64 else 1e-6
    )


@pytest.mark.parametrize("name", MOVABLE)
def test_a_training_graph_moved_to_evaluation_evaluates(name):
    # as quantization-aware training does it: the operators alone are changed, what else is in the graph still runs
    pt2e = pytest.importorskip("torchao.quantization.pt2e")
    layer = unlike(LAYERS[name]())
    graph = exported(layer, images()).module()
    pt2e.move_exported_model_to_eval(graph)
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    x = images(9)
    assert_close(graph(x), layer.eval()(x), rtol=1e-5, atol=1e-5)
    for key in ("running_mean", "running_var"):
        assert_close(graph.state_dict()[key], before[key], rtol=1e-6, atol=1e-6)


ELSEWHERE = """
import sys
sys.modules["batchnorm"] = None  # importing it is an error
import torch
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close({program}(x), expected, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.filterwarnings("ignore")
def test_executorch_s_edge_dialect_and_runtime(name):
    why = "ExecuTorch brings 35 packages, which no other test needs: pip install executorch"
    exir, runtime = (pytest.importorskip(f"executorch.{part}", reason=why) for part in ("exir", "runtime"))
    theirs = unlike(pytest.importorskip("torchvision").models.get_model(name, weights=None)).eval()
    ours, x = bn.upgrade(copy.deepcopy(theirs))[0].eval(), torch.randn(2, 3, 64, 64)
    outputs, nodes = [], []
    for model in (theirs, ours):
        edge = exir.to_edge(torch.export.export(model, (x,)))
        nodes.append(
            [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]
        )
        program = runtime.Runtime.get().load_program(edge.to_executorch().buffer)
        outputs.append(program.load_method("forward").execute([x])[0])
    assert sorted(nodes[1]) == sorted(nodes[0])  # a residual is computed before the layer that adds it
    assert_close(outputs[1], outputs[0])
    assert_close(outputs[1], theirs(x), rtol=1e-4, atol=1e-4)


def _run_elsewhere(program, path, folder):
    arguments = [path, folder / "expected.pt"]
    subprocess.run([sys.executable, "-c", ELSEWHERE.format(program=program), *arguments], check=True)


@pytest.mark.slow
def test_aot_inductor_s_package_runs_where_batchnorm_is_not(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    bn.upgrade(unlike(model))
    x = images(6)
    torch._inductor.aoti_compile_and_package(exported(model, x), package_path=str(tmp_path / "package.pt2"))
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    _run_elsewhere("torch._inductor.aoti_load_package(sys.argv[1])", tmp_path / "package.pt2", tmp_path)


@pytest.mark.slow
@each_mode
def test_a_program_runs_where_batchnorm_is_not(tmp_path, training):
    models = pytest.importorskip("torchvision").models
    model, _ = bn.upgrade(unlike(models.resnet18(num_classes=4)).train(training))
    x = torch.randn(2, 3, 64, 64)
    torch.export.save(exported(model, x), tmp_path / "program.pt2")
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    _run_elsewhere("torch.export.load(sys.argv[1]).module()", tmp_path / "program.pt2", tmp_path)


@pytest.mark.slow
@each_mode
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_an_upgraded_network_has_no_more_operators(name, training):
    models = pytest.importorskip("torchvision").models
    theirs = models.get_model(name, weights=None, num_classes=4).train(training)
    ours, _ = bn.upgrade(copy.deepcopy(theirs))
    x = torch.randn(4, 3, 64, 64)
    programs = [exported(model, x) for model in (ours, theirs)]
    assert foreign(programs[0]) == []
    counts = [sum(operators(program).values()) for program in programs]
    assert counts[0] <= counts[1]


MUTATIONS = [
    Mutation(
        "export sees our operators", "kernels/observers.py",
        "return torch.compiler.is_exporting() or (", "return (",
        "a program that runs only where batchnorm is installed",
    ),
    Mutation(
        "copies that begin at 0", "kernels/dispatch.py",
        "own_mean, own_variance = (values.to(dtype, copy=True)",
        "own_mean, own_variance = (torch.zeros_like(values)",
        "a training graph moved to evaluation normalises by zeros",
    ),
]  # fmt: skip
