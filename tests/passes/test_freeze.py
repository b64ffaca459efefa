"""`freeze`: layers that are trained as they will be used, and `unfreeze`, which undoes it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torchvision.models import resnet18

import batchnorm as bn
from tests.constructors import each_layer, each_setting
from tests.mutations.mutation import Mutation
from tests.passes.compare import unlike

BATCHES = [(1 + k) * torch.randn(5, 3, generator=torch.Generator().manual_seed(k)) for k in range(4)]


def small(layer=nn.BatchNorm1d, **options):
    """Two layers behind another that move if they are let."""
    return unlike(nn.Sequential(nn.Linear(3, 3), layer(3, **options), nn.ReLU(), layer(3, **options)))


def steps(model, batches=BATCHES):
    """A few steps of training; dtype and device are the model's."""
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        optimiser.zero_grad()
        model(x.to(next(model.parameters()))).square().sum().backward()
        optimiser.step()
    return model


def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def in_evaluation(model):
    """Let torch's layers be evaluated in a model that is trained."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def gradients(model, x, dy):
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    output.backward(dy)
    return output.detach(), x.grad, {name: value.grad for name, value in model.named_parameters()}


@each_setting
@each_layer
def test_a_frozen_layer_in_training_is_torchs_in_evaluation(ours, torch_s, shape, options):
    theirs = unlike(torch_s(3, dtype=torch.float64, **options))
    x, dy = torch.randn(2, *shape).double()
    for layer in (copy.deepcopy(theirs), ours(3, dtype=torch.float64, **options)):
        layer.load_state_dict(theirs.state_dict())
        before = copy.deepcopy(layer.state_dict())
        if not theirs.track_running_stats:
            with pytest.raises(ValueError, match="the model itself: there are none"):
                bn.freeze(layer)
            assert type(layer) in (ours, torch_s) and getattr(layer, "statistics", None) is None
            continue
        assert bn.freeze(layer)[0] is layer and type(layer) is ours
        found, expected = gradients(layer.train(), x, dy), gradients(theirs.eval(), x, dy)
        assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert_close(layer.state_dict(), before, rtol=0, atol=0)
        assert torch.equal(layer.eval()(x), found[0])


@pytest.mark.slow
def test_resnet18_is_trained_as_it_is_used():
    theirs = unlike(resnet18(num_classes=5)).double()
    frozen = bn.freeze(copy.deepcopy(theirs))[0].train()
    assert all(type(each) is bn.BatchNorm2d for each in layers(frozen))
    assert list(frozen.state_dict()) == list(theirs.state_dict())
    x, dy = torch.randn(3, 3, 32, 32).double(), torch.randn(3, 5).double()
    found, expected = gradients(frozen, x, dy), gradients(in_evaluation(theirs), x, dy)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(frozen.eval()(x), frozen.train()(x))
    before = statistics(frozen)
    steps(frozen, [x])
    assert_close(statistics(frozen), before, rtol=0, atol=0)


def layers(model):
    return [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, bn.BatchNorm1d, nn.SyncBatchNorm])
def test_statistics_stay_while_weights_are_trained(layer):
    model = bn.freeze(small(layer))[0]
    before, weight = statistics(model), model[1].weight.detach().clone()
    for _ in range(2):
        steps(model.eval().train())
    assert_close(statistics(model), before, rtol=0, atol=0)
    assert not torch.equal(model[1].weight, weight)
    bn.unfreeze(model)
    steps(model, BATCHES[:1])
    assert all(
        not torch.equal(value, before[name]) for name, value in model.named_buffers() if "skip" not in name
    )
    assert model[1].num_batches_tracked == 1


def test_unfrozen_it_is_as_if_nothing_had_been():
    plain = small()
    model = bn.unfreeze(bn.freeze(copy.deepcopy(plain), affine=True)[0])[0]
    assert_close(steps(model).state_dict(), steps(plain).state_dict())


def test_affine_freezes_weight_and_bias():
    model = small()
    bn.freeze(model, affine=True)
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["0.weight", "0.bias"]
    before = copy.deepcopy(model.state_dict())
    steps(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "0.bias"}
    bn.unfreeze(model)
    assert all(each.requires_grad for each in model.parameters())
    steps(model)
    assert all(
        not torch.equal(model.state_dict()[name], before[name]) for name in ("1.weight", "1.running_var")
    )


def test_affine_alone_leaves_statistics_and_layers():
    model = small()
    bn.freeze(model, stats=False, affine=True)
    assert not model[1].weight.requires_grad
    assert [type(each) for each in layers(model)] == [nn.BatchNorm1d] * 2
    before = statistics(model)
    steps(model)
    assert all(not torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_half_of_it_can_be_undone():
    model = bn.freeze(small(), affine=True)[0]
    bn.unfreeze(model, affine=False)
    assert [(each.statistics, each.weight.requires_grad) for each in layers(model)] == [(None, False)] * 2
    bn.freeze(model)
    bn.unfreeze(model, stats=False)
    assert [(each.statistics, each.weight.requires_grad) for each in layers(model)] == [
        (bn.Population(), True)
    ] * 2


@pytest.mark.parametrize("affine", [True, False])
def test_without_weight_or_bias(affine):
    model = bn.freeze(small(affine=affine, **({"bias": False} if affine else {})), affine=True)[0]
    assert not any(each.requires_grad for each in model[1].parameters())
    assert all(each.requires_grad for each in bn.unfreeze(model)[0].parameters())


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("own", [None, bn.Ghost(2), bn.Renorm()], ids=repr)
def test_the_statistics_come_back_however_often_it_was_frozen(own, times):
    model = small(bn.BatchNorm1d, statistics=own)
    for _ in range(times):
        bn.freeze(model)
    assert [each.statistics for each in layers(model)] == [bn.Population(own)] * 2
    bn.unfreeze(model)
    assert [each.statistics for each in layers(model)] == [own] * 2
    bn.unfreeze(model)
    assert [each.statistics for each in layers(model)] == [own] * 2


def test_what_was_frozen_by_hand_is_unfrozen_too():
    model = small(bn.BatchNorm1d, statistics=bn.Population())
    assert [each.statistics for each in layers(bn.unfreeze(model)[0])] == [None] * 2


def test_torchs_synchronised_layer_comes_back_synchronised():
    model = bn.unfreeze(bn.freeze(small(nn.SyncBatchNorm))[0])[0]
    assert isinstance(model[1].statistics, bn.Sync) and type(model[1]) is bn.BatchNorm


def test_unfreeze_leaves_layers_of_torchs():
    model = small()
    bn.unfreeze(model)
    assert type(model[1]) is nn.BatchNorm1d


class Own(nn.BatchNorm1d):
    pass


BLOCKED = {
    "a subclass": (lambda: Own(3), r"bad is Own of .*, not exactly a layer of torch's"),
    "without statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), "bad: there are none"),
    "ours without": (lambda: bn.BatchNorm1d(3, track_running_stats=False), "bad: there are none"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.BatchNorm1d(3)),
        "bad has parametrizations",
    ),
}


@pytest.mark.parametrize("kind", BLOCKED)
def test_a_layer_that_cannot_be_frozen_is_named_and_nothing_has_changed(kind):
    make, said = BLOCKED[kind]
    model = nn.Sequential()
    for name, layer in (("first", nn.BatchNorm1d(3)), ("bad", make()), ("last", bn.BatchNorm1d(3))):
        model.add_module(name, layer)
    kinds = [type(each) for each in model]
    with pytest.raises(ValueError, match=said):
        bn.freeze(model, affine=True)
    assert [type(each) for each in model] == kinds
    assert model.get_submodule("last").statistics is None
    assert all(each.requires_grad for each in model.parameters())


def test_all_that_cannot_be_frozen_are_named():
    model = nn.Sequential(Own(3), nn.BatchNorm1d(3), Own(3))
    with pytest.raises(ValueError, match=r"0 is Own.*; 2 is Own"):
        bn.freeze(model)


def test_a_model_without_layers():
    model = nn.Linear(3, 3)
    assert bn.unfreeze(bn.freeze(model, affine=True)[0])[0] is model
    assert model.weight.requires_grad


def test_hooks_stay():
    model, seen = small(), []
    model[1].register_forward_hook(lambda *_: seen.append("after"))
    model[1].register_forward_pre_hook(lambda *_: seen.append("before"))
    bn.freeze(model)[0](BATCHES[0])
    assert seen == ["before", "after"]


def test_a_shared_layer_is_frozen_once():
    layer = nn.BatchNorm1d(3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    bn.freeze(model)
    assert model[0] is model[2] is layer
    assert layer.statistics == bn.Population()
    assert bn.unfreeze(model)[0][2].statistics is None


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_is_frozen_and_can_be_unfrozen(copied):
    model = bn.freeze(small(bn.BatchNorm1d, statistics=bn.Ghost(2)))[0]
    new = copied(model)
    before = statistics(new)
    assert_close(steps(new).state_dict(), steps(model).state_dict(), rtol=0, atol=0)
    assert_close(statistics(new), before, rtol=0, atol=0)
    bn.unfreeze(new)
    assert new[1].statistics == bn.Ghost(2) and model[1].statistics == bn.Population(bn.Ghost(2))


def test_a_checkpoint_does_not_tell():
    model = small()
    keys = list(model.state_dict())
    bn.freeze(model)
    assert list(model.state_dict()) == keys
    assert (
        small().load_state_dict(model.state_dict()) == model.load_state_dict(small().state_dict()) == ([], [])
    )


def test_one_sample_is_no_error():
    model = bn.freeze(small())[0]
    assert_close(model.train()(BATCHES[0][:1]), model.eval()(BATCHES[0][:1]), rtol=0, atol=0)


def test_fused_layers_are_frozen_as_they_are():
    model, _ = bn.upgrade(small())
    expected = model.eval()(BATCHES[0])
    assert_close(bn.freeze(model)[0].train()(BATCHES[0]), expected, rtol=0, atol=0)
    bn.unfreeze(model)
    assert model[1].activation == "relu"


def test_a_frozen_layer_uses_the_statistics_of_its_domain():
    layer = bn.BatchNorm1d(3)
    with bn.domain("a"):
        layer(BATCHES[1])
        bn.freeze(layer)
        before = statistics(layer)
        assert_close(layer(BATCHES[2]), copy.deepcopy(layer).eval()(BATCHES[2]), rtol=0, atol=0)
    own = layer(BATCHES[2])
    assert_close(own, nn.BatchNorm1d(3).eval()(BATCHES[2]))
    assert_close(statistics(layer), before, rtol=0, atol=0)


def test_by_hand_a_layer_without_statistics_says_what_is_wrong():
    layer = bn.BatchNorm1d(3, track_running_stats=False, statistics=bn.Population())
    with pytest.raises(RuntimeError, match="this layer keeps none"):
        layer(BATCHES[0])


MUTATIONS = [
    Mutation(
        "frozen twice, unfrozen once", "passes/freeze.py",
        "if not isinstance(layer.statistics, Population):", "if True:",
        "what a layer did before is kept, not that it was frozen",
    ),
]  # fmt: skip
