"""The layers with what torch does to modules: tracing, compiling, exporting, converting, and whole models."""

import copy
import textwrap
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import batchnorm as bn
from tests.kernels.processes import said
from tests.mutations.mutation import Mutation
from tests.test_layers import X, exactly, used


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first = bn.BatchNorm2d(3, activation="relu")
        self.second = bn.BatchNorm2d(3, momentum=None, activation="silu")

    def forward(self, x):
        return self.second(self.conv(self.first(x)), x)


def test_fx_keeps_the_layer_as_one_node():
    model = Residual()
    traced = torch.fx.symbolic_trace(model)
    called = [(node.target, len(node.args)) for node in traced.graph.nodes if node.op == "call_module"]
    assert called == [("first", 1), ("conv", 1), ("second", 2)]
    x = torch.randn(2, 3, 4, 4)
    exactly(traced.eval()(x), model.eval()(x))


@pytest.mark.parametrize("constant", ["a buffer", "a tensor"])
def test_fx_keeps_the_layer_as_one_node_when_only_the_residual_is_traced(constant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bn.BatchNorm1d(3, activation="relu")
            self.register_buffer("start", X.clone())

        def forward(self, x):
            return self.norm(self.start if constant == "a buffer" else X, x)

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    called = [node for node in traced.graph.nodes if node.op.startswith("call")]
    assert [(node.op, node.target, len(node.args)) for node in called] == [("call_module", "norm", 2)]
    x = torch.randn(4, 3)
    exactly(traced.eval()(x), model.eval()(x))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_trains_on_fake_tensors(momentum):
    # as tools do that ask for shapes and memory alone: there is no value to ask for
    with FakeTensorMode():
        layer = bn.BatchNorm2d(3, momentum=momentum)
        y = layer(torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2))
        y.sum().backward()
        layer.eval().train()
    assert y.shape == (4, 3, 2, 2)
    assert layer.weight.grad is not None and layer.weight.grad.shape == (3,)


@pytest.mark.parametrize("tracing_mode", ["fake", "symbolic", "real"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_traced_to_operators_in_training_it_gives_the_same(momentum, tracing_mode):
    layer = used(bn.BatchNorm1d, momentum=momentum)

    def call(state, x):
        return torch.func.functional_call(layer, state, (x,))

    def state():
        return {name: t.detach().clone() for name, t in (*layer.named_parameters(), *layer.named_buffers())}

    traced = make_fx(call, tracing_mode=tracing_mode)(state(), torch.randn(4, 3))
    for x in (torch.randn(4, 3), torch.full((4, 3), torch.nan)):
        given = state()
        y = traced(given, x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = layer(x)
        assert_close(y, expected, equal_nan=True)
        assert_close(given, state())


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0)])
def test_compiled_as_one_graph_it_takes_an_empty_batch(shape, training):
    layer = used(bn.BatchNorm1d).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.empty(shape, requires_grad=True)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    y.sum().backward()
    assert y.shape == shape
    assert not layer.weight.grad.any()
    exactly(layer.state_dict(), before)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiled_as_one_graph_it_gives_the_same(training):
    model = Residual().double().train(training)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        outputs = [m(x) for m in (model, compiled)]
        assert_close(*outputs)
        for y in outputs:
            y.square().sum().backward()
    assert_close(other.state_dict(), model.state_dict())
    for name, parameter in model.named_parameters():
        assert_close(other.get_parameter(name).grad, parameter.grad)


def test_exports():
    model, x = Residual().eval(), torch.randn(2, 3, 4, 4)
    assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_converts_to_torch_s_sync_batch_norm():
    layer = used(bn.BatchNorm1d)
    exactly(nn.SyncBatchNorm.convert_sync_batchnorm(layer).state_dict(), layer.state_dict())


# --- torchvision's models


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_model_of_torchvision_trains_as_with_torch_s_layers(name):
    make = getattr(pytest.importorskip("torchvision").models, name)
    models = [make(num_classes=5, norm_layer=layer).double() for layer in (bn.BatchNorm2d, nn.BatchNorm2d)]
    ours, torch_s = models
    assert sum(type(module) is bn.BatchNorm2d for module in ours.modules()) == sum(
        type(module) is nn.BatchNorm2d for module in torch_s.modules()
    )
    assert torch_s.load_state_dict(ours.state_dict()) == ([], [])
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in models]

    def near(a, b):
        assert_close(a, b, rtol=1e-9, atol=1e-9)

    for _ in range(2):
        x, target, losses = torch.randn(8, 3, 32, 32).double(), torch.randint(5, (8,)), []
        for model, optimiser in zip(models, optimisers, strict=True):
            with torch.random.fork_rng():  # mobilenet_v2 drops out
                losses.append(nn.functional.cross_entropy(model(x), target))
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        near(*losses)
    near(ours.state_dict(), torch_s.state_dict())
    near(ours.eval()(x), torch_s.eval()(x))
    assert ours.load_state_dict(torch_s.state_dict()) == ([], [])
    near(ours(x), torch_s(x))


# --- torch's own module tests

# In a process of its own: torch's test tools change global flags when they are imported, need a package that they
# only use for expected output, and warn.
TORCHS_CASES = textwrap.dedent("""
    import sys, types, unittest, torch
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase, __spec__=None)
    from torch.testing._internal.common_modules import module_db
    import batchnorm as bn

    torch.set_num_threads(1)
    cases = 0
    for info in module_db:
        if not info.name.startswith("nn.BatchNorm"):
            continue
        ours = getattr(bn, info.name.removeprefix("nn."))
        for training in (True, False):
            for case in info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training):
                made, given = case.constructor_input, case.forward_input
                layers = [kind(*made.args, **made.kwargs).double().train(training) for kind in (ours, info.module_cls)]
                layers[0].load_state_dict(layers[1].state_dict())
                if given.args[0].numel() == 0:
                    layers[1].num_batches_tracked -= 1 * training  # we do not count an empty batch
                outcomes = []
                for layer in layers:
                    y = layer(*given.args, **given.kwargs)
                    asked = [*given.args, *layer.parameters()]
                    outcomes.append((y, torch.autograd.grad(y.sin().sum(), asked), layer.state_dict()))
                torch.testing.assert_close(*outcomes, msg=lambda text: f"{info.name} {case.desc}: {text}")
                cases += 1
    print(cases)
""")


@pytest.mark.slow
def test_torch_s_own_module_inputs():
    assert int(said(TORCHS_CASES)) >= 44  # as many as torch 2.14 has


@pytest.mark.parametrize("statistics", [None, bn.Ghost(3), bn.Renorm(), bn.Population(), bn.Sync()], ids=repr)
def test_models_stacked_by_their_state_dicts_are_mapped_over(statistics):
    # num_batches_skipped is in no state_dict, so all of them share one
    layers = [bn.BatchNorm1d(3, statistics=statistics) for _ in range(2)]
    states = {
        name: torch.stack([layer.state_dict()[name] for layer in layers]) for name in layers[0].state_dict()
    }
    xs = torch.randn(2, 6, 3)
    expected = torch.stack([copy.deepcopy(layer)(x) for layer, x in zip(layers, xs, strict=True)])
    template = bn.BatchNorm1d(3, statistics=statistics)
    mapped = torch.func.vmap(lambda state, x: torch.func.functional_call(template, state, (x,)))(states, xs)
    torch.testing.assert_close(mapped, expected)


MUTATIONS = [
    Mutation(
        "a traced residual not seen", "layers.py",
        "for value in (input, residual, mask):", "for value in (input, mask):",
        "torch.fx walks into the layer",
    ),
]  # fmt: skip
