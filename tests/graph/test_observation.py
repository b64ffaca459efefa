"""One run of a model, seen whole: every BN call of real networks, views, changes in place, and nothing left behind."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.graph.observation import BATCH_NORM, REREAD, Observation, behind_layout, observe
from tests.mutations.mutation import Mutation

X = torch.randn(2, 3, 8, 8)


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def seen_of(forward, *inputs, **modules):
    """What is seen of a module with this forward and these children."""
    model = nn.Module()
    for name, module in modules.items():
        model.add_module(name, module)
    model.forward = lambda *given: forward(model, *given)
    return observe(model.eval(), *(inputs or (X,)))


def batch_norms(seen: Observation):
    return [operation for operation in seen.operations if operation.name in BATCH_NORM]


def made(value):
    """The operator that made a value."""
    return None if value.producer is None else value.producer.name


def names(seen: Observation):
    return [operation.name.removeprefix("aten.") for operation in seen.operations]


# ---- what made what


def test_a_chain_is_seen_with_its_parameters_and_the_calls_of_its_modules():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    ).eval()
    seen = observe(model, X)
    (norm,) = batch_norms(seen)
    convolution = norm.reads[0].producer
    assert convolution is not None and convolution.name == "aten.convolution"
    assert [value.name for value in convolution.reads] == ["", "0.weight", "0.bias"]
    assert [value.kind for value in convolution.reads] == ["input", "parameter", "parameter"]
    assert [value.name for value in norm.reads[1:]] == [
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
    ]
    assert [value.kind for value in norm.reads[3:]] == ["buffer", "buffer"]
    assert norm.reads[0].only_user is norm
    assert convolution.call is not None and (convolution.call.path, convolution.call.number) == ("0", 0)
    (call,) = seen.calls_of(model[1])
    assert call.reads == [norm.reads[0]] and call.returns == [norm.results[0]]
    assert call.caller is seen.calls[0] and seen.calls[0].path == ""
    assert [call.path for call in seen.calls] == ["", "0", "1", "2", "3", "4"]
    assert seen.outputs[0].is_output and seen.outputs[0].producer is seen.operations[-1]
    assert seen.inputs[0].shape == X.shape


def test_users_are_counted_once_and_an_output_has_one_more():
    seen = seen_of(lambda m, x: (m.bn(x) * 1, m.bn(x)), bn=nn.BatchNorm2d(3))
    first, second = batch_norms(seen)
    assert first.results[0].only_user is not None and first.results[0].only_user.name == "aten.mul"
    assert second.results[0].only_user is None  # the model returns it
    assert len(seen.inputs[0].users) == 2
    both = seen_of(lambda m, x: (y := m.bn(x), y * 2), bn=nn.BatchNorm2d(3))
    assert len(both.outputs[0].users) == 1 and both.outputs[0].only_user is None
    assert [call.number for call in seen.calls_of(seen.calls[1].module)] == [0, 1]


def test_the_layer_s_input_is_found_behind_what_only_arranges_it():
    def forward(m, x):
        y = m.linear(x).transpose(1, 3).contiguous()
        return m.bn(y.unsqueeze(-1).squeeze(-1).flatten(2))

    seen = seen_of(forward, linear=nn.Linear(8, 4), bn=nn.BatchNorm1d(4))
    (norm,) = batch_norms(seen)
    linear = behind_layout(norm.reads[0]).producer
    assert linear is not None and linear.name in ("aten.addmm", "aten.linear", "aten.mm")
    assert linear.call is not None and linear.call.path == "linear"
    dropped = seen_of(lambda m, x: m.bn(x.relu().transpose(2, 3)), bn=nn.BatchNorm2d(3))
    assert made(behind_layout(batch_norms(dropped)[0].reads[0])) == "aten.relu"


# ---- changes in place


def test_a_change_in_place_is_a_new_value():
    def forward(m, x):
        y = m.conv(x)
        F.relu_(y)
        return m.bn(y)

    seen = seen_of(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    (norm,) = batch_norms(seen)
    assert made(norm.reads[0]) == "aten.relu_"
    (conv,) = [operation for operation in seen.operations if operation.name == "aten.convolution"]
    assert [user.name for user in conv.results[0].users] == ["aten.relu_"]


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y[0].mul_(2),
        lambda y: y.view(-1).add_(1),
        lambda y: y.detach().zero_(),
        lambda y: y.T.mul_(3),
    ],
)
@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors")
def test_a_change_through_a_view_is_seen_by_all_that_share_the_memory(change):
    def forward(m, x):
        y = m.conv(x)
        other = y.transpose(0, 1)
        change(y)
        return m.bn(y) + other.transpose(0, 1)

    seen = seen_of(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    (norm,) = batch_norms(seen)
    reread = norm.reads[0].producer
    assert reread is not None and reread.name == REREAD
    assert made(reread.reads[0]) == "aten.convolution"
    assert len([name for name in names(seen) if name == REREAD]) == 2  # y, and its other view
    assert norm.reads[0] not in [value for operation in seen.operations[:3] for value in operation.results]


def test_what_is_written_into_an_output_argument_is_a_result():
    def forward(m, x):
        y = torch.empty_like(x)
        torch.mul(x, 2, out=y)
        return m.bn(y)

    (norm,) = batch_norms(seen_of(forward, bn=nn.BatchNorm2d(3)))
    assert made(norm.reads[0]) == "aten.mul"


# ---- whatever a forward does


def test_control_flow_custom_functions_constants_and_arguments_by_name():
    constant = torch.ones(3, 1, 1)

    def forward(m, x):
        y = Custom.apply(x)
        if float(y.sum()) > -1e9:  # no tracer goes on
            y = y + constant
        return m.bn(input=y)

    seen = seen_of(forward, bn=nn.BatchNorm2d(3))
    (norm,) = batch_norms(seen)
    add = norm.reads[0].producer
    assert add is not None and [value.kind for value in add.reads] == ["result", "constant"]
    (call,) = [call for call in seen.calls if call.path == "bn"]
    assert call.reads == [norm.reads[0]]


def test_a_module_that_is_made_in_a_forward_and_one_with_two_paths():
    shared = nn.BatchNorm2d(3)
    seen = seen_of(lambda m, x: m.b(m.a(nn.ReLU()(x))), a=shared, b=shared)
    assert [call.path for call in seen.calls] == ["", ".<ReLU>", "a", "a"]


@pytest.mark.parametrize("kernels", ["native", "torch", "reference"])
def test_our_layers_are_seen_whatever_computes(kernels):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu")).eval()
    with bn.kernels.use(kernels):
        seen = observe(model, X)
        expected = model(X)
    (call,) = seen.calls_of(model[1])
    assert made(call.reads[0]) == "aten.convolution"
    assert seen.outputs[0].shape == expected.shape
    if kernels != "reference":
        assert len(batch_norms(seen)) == 1


REAL = [
    "resnet18",
    "levit_128s",
    "mixnet_s",
    "hrnet_w18_small",
    "repvit_m0_9",
    "densenet121",
    "dpn68b",
    "ghostnet_100",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_every_call_of_a_real_network_is_seen_in_its_module(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name).eval()
    size = 224 if "levit" in name else 64
    layers = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    called = []
    handles = [layer.register_forward_hook(lambda layer, *_: called.append(layer)) for layer in layers]
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    seen = observe(model, torch.zeros(1, 3, size, size))
    assert [operation.call.module for operation in batch_norms(seen) if operation.call] == called
    assert len(called) > 15


# ---- nothing is left behind


def state(model):
    return [values.clone() for values in model.state_dict().values()], torch.get_rng_state()


def test_in_training_too_the_model_and_the_generators_are_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Identity()).train()
    before, random = state(model)
    seen = observe(model, X)
    after, random_after = state(model)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert torch.equal(random, random_after)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    (norm,) = batch_norms(seen)
    assert {"1.running_mean", "1.running_var"} <= {value.name for value in norm.reads}


def test_a_forward_that_raises_leaves_everything_as_it_was():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            self.bn(x)
            raise KeyError("no such thing")

    model = Raises().train()
    before, random = state(model)
    with pytest.raises(KeyError, match="no such thing"):
        observe(model, X)
    after, random_after = state(model)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert torch.equal(random, random_after)
    assert len(observe(nn.ReLU(), X).calls) == 1  # no hook of the first is left


def test_no_tensor_outlives_the_observation():
    tensors = []

    def forward(m, x):
        y = m.conv(x)
        tensors.append(weakref.ref(y))
        return y.relu()

    seen = seen_of(forward, conv=nn.Conv2d(3, 4, 3))
    gc.collect()
    assert seen.operations and tensors[0]() is None


def test_a_compiled_model_is_refused_by_name():
    model = nn.Sequential()
    model.add_module("0", torch.compile(nn.ReLU()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 is compiled: observe the module itself"):
        observe(model, X)


MUTATIONS = [
    Mutation(
        "changes through views not looked for", "graph/observation.py",
        "if len(changes) == included:", "if True:",
        "a BN would be folded into what was changed since",
    ),
    Mutation(
        "an output has no user", "graph/observation.py",
        "if len(self.users) == 1 and not self.is_output else None", "if len(self.users) == 1 else None",
        "what the model returns would be changed",
    ),
]  # fmt: skip
