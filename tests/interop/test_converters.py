"""Tools that build a layer from another's attributes: with ours they are right, or they say what they would drop."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.testing import assert_close

import batchnorm as bn
from tests.kernels.processes import said
from tests.mutations.mutation import Mutation
from tests.passes.blocks import X
from tests.passes.compare import unlike

sync = nn.SyncBatchNorm.convert_sync_batchnorm


def timm_sync(model):
    return pytest.importorskip("timm.layers").convert_sync_batchnorm(model)


def timm_freeze(model):
    return pytest.importorskip("timm.layers").freeze_batch_norm_2d(model)


def lightning_sync(model):
    return pytest.importorskip("lightning.pytorch.plugins").TorchSyncBatchNorm().apply(model)


SYNC = {"torch": sync, "timm": timm_sync, "lightning": lightning_sync}
EVERY = SYNC | {"timm_freeze": timm_freeze}
each_sync = pytest.mark.parametrize("convert", SYNC.values(), ids=SYNC)
each_tool = pytest.mark.parametrize("convert", EVERY.values(), ids=EVERY)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + x)


def network():
    return unlike(nn.Sequential(Block(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))


@each_tool
def test_layers_that_do_what_torch_s_do_are_converted_as_torch_s(convert):
    theirs = network()
    ours, _ = bn.upgrade(copy.deepcopy(theirs), fuse=False)
    expected = theirs.eval()(X.float())
    converted = convert(ours.eval())
    assert not any(isinstance(each, bn.BatchNorm2d) for each in converted.modules())
    assert_close(converted(X.float()), expected)


@each_tool
def test_a_rewritten_forward_does_itself_what_the_converted_layer_does_no_more(convert):
    theirs = network()
    ours, report = bn.upgrade(copy.deepcopy(theirs))
    assert report["0.norm"].what == "residual, relu"
    assert_close(convert(ours.eval())(X.float()), theirs.eval()(X.float()))


@each_tool
def test_an_activation_that_nobody_else_would_do_is_not_dropped(convert):
    for model in (
        nn.Sequential(bn.BatchNorm2d(3, activation="relu")),
        bn.upgrade(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))[0],
    ):
        advice = "freeze" if convert is timm_freeze else "convert_sync"
        with pytest.raises(
            RuntimeError, match=rf"nothing of activation='relu', .* call bn\.{advice}\(model\)"
        ):
            convert(model)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "Ghost": ({"statistics": bn.Ghost(2)}, r"statistics=Ghost\(size=2\)"),
    "frozen": ({"statistics": bn.Population()}, r"statistics=Population"),
    "debiased": ({"debiased": True}, "debiased=True"),
    "on_single": ({"on_single": "running"}, "on_single='running'"),
}


@each_sync
@pytest.mark.parametrize("name", OPTIONS)
def test_a_layer_that_trains_otherwise_is_not_made_plain(name, convert):
    options, lost = OPTIONS[name]
    with pytest.raises(RuntimeError, match=rf"convert_sync_batchnorm of .* knows nothing of {lost}"):
        convert(nn.Sequential(bn.BatchNorm2d(3, **options)))


@each_sync
def test_sync_becomes_torch_s(convert):
    assert type(convert(nn.Sequential(bn.BatchNorm2d(3, statistics=bn.Sync())))[0]) is nn.SyncBatchNorm


def test_timm_freezes_what_trains_otherwise_but_evaluates_the_same():
    model = unlike(nn.Sequential(bn.BatchNorm2d(3, statistics=bn.Ghost(2))))
    expected = model.eval()(X.float())
    assert_close(timm_freeze(model)(X.float()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("convert", [timm_freeze, timm_sync], ids=["freeze", "sync"])
@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
def test_timm_s_networks(name, convert, fuse):
    theirs = unlike(pytest.importorskip("timm").create_model(name, num_classes=4)).eval()
    ours, _ = bn.upgrade(copy.deepcopy(theirs), fuse=fuse)
    x = torch.randn(2, 3, 64, 64)
    if fuse and name != "resnet18":  # activations of timm's layers, which nobody would do again
        with pytest.raises(RuntimeError, match="knows nothing of activation"):
            convert(ours)
        ours, _ = bn.downgrade(ours)
    assert_close(convert(ours).eval()(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_without_fusing_timm_s_layers_are_left_alone():
    layer = pytest.importorskip("timm.layers").BatchNormAct2d
    model, report = bn.upgrade(nn.Sequential(layer(3), nn.BatchNorm2d(3)), fuse=False)
    assert type(model[0]) is layer and type(model[1]) is bn.BatchNorm2d
    assert report["0"].outcome == "left alone" and "activation of its own" in report["0"].why


SEEN_BY_DDP = """
import os, tempfile
import torch, torch.distributed as dist
from torch import nn
import batchnorm as bn
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
for statistics in (bn.Sync(), bn.Population(bn.Sync()), bn.Ghost(2), None):
    model = nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3, statistics=statistics))
    parallel = nn.parallel.DistributedDataParallel(model)
    print(bool(parallel._get_ddp_logging_data()["has_sync_bn"]), isinstance(model[1], nn.SyncBatchNorm))
"""


def test_distributed_data_parallel_sees_which_layers_are_synchronized():
    assert said(SEEN_BY_DDP).splitlines() == ["True False", "False False", "False False", "False False"]


# --- folding


@pytest.mark.parametrize("dims", [1, 2, 3, "linear"])
def test_torch_folds_a_layer_without_an_activation(dims):
    fold: Any = fuse_conv_bn_eval
    if dims == "linear":
        linear, layer, fold = nn.Linear(3, 4), bn.BatchNorm1d(4), fuse_linear_bn_eval
    else:
        linear = getattr(nn, f"Conv{dims}d")(3, 4, 2)
        layer = getattr(bn, f"BatchNorm{dims}d")(4, statistics=bn.Ghost(2))
    unlike(layer)
    x = torch.randn(2, 3, *[5] * (0 if dims == "linear" else dims))
    assert_close(fold(linear.eval(), layer.eval())(x), layer(linear(x)), rtol=1e-4, atol=1e-5)
    layer.activation = "relu"
    with pytest.raises(
        RuntimeError, match=r"_bn_eval of .* knows nothing of activation='relu'.*bn\.downgrade\(model\) first"
    ):
        fold(linear, layer)


def test_a_rewritten_forward_whose_layer_was_folded_activates_itself():
    theirs = Block().eval()
    ours, _ = bn.upgrade(copy.deepcopy(unlike(theirs)))
    ours.conv, ours.norm = fuse_conv_bn_eval(ours.conv, ours.norm), nn.Identity()
    assert_close(ours(X.float()), theirs(X.float()), rtol=1e-4, atol=1e-5)


def test_anybody_else_reads_eps_as_ever():
    layer = bn.BatchNorm2d(3, eps=1e-3, activation="relu")
    assert layer.eps == 1e-3 and "eps=0.001" in repr(layer)
    layer.eps = 0.5
    assert layer.eps == vars(layer)["eps"] == 0.5


# --- opacus


@pytest.mark.filterwarnings("ignore")
def test_opacus_finds_ours_as_it_finds_torch_s():
    validator = pytest.importorskip("opacus.validators").ModuleValidator
    for model in (network(), bn.upgrade(network(), fuse=False)[0]):
        assert len(validator.validate(model.train())) == 2
        fixed = validator.fix(model)
        assert [type(each).__name__ for each in fixed.modules()].count("GroupNorm") == 2
        assert validator.validate(fixed) == []
    with pytest.raises(
        RuntimeError, match=r"would drop activation='relu': call bn\.downgrade\(model\) first"
    ):
        validator.fix(nn.Sequential(bn.BatchNorm2d(3, activation="relu")))


MUTATIONS = [
    Mutation(
        "eps asks nobody", "layers.py",
        "            guards.check_reader(sys._getframe(1), self._beside_torch_s)\n", "            pass\n",
        "a converter drops an activation",
    ),
    Mutation(
        "fuse=False converts timm's layers", "passes/upgrade.py",
        "        obstacles = fused | obstacles\n", "        pass\n",
        "timm's own tools no longer know them",
    ),
    Mutation(
        "a rewritten forward restores nothing", "graph/rewrite.py",
        'vars(layer)["restorable"] = layer.activation', "pass",
        "converters refuse what they would do right",
    ),
    Mutation(
        "opacus sees no batch normalization", "guards.py",
        "        known.VALIDATORS[kind] = known.VALIDATORS[theirs]\n", "",
        "private training that is not",
    ),
]  # fmt: skip
