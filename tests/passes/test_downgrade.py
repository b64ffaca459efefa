"""`bn.downgrade`: after `upgrade` it gives back the model that was upgraded; of other models torch's equivalent."""

import copy
import io
import pickle
import subprocess
import sys
from typing import Any, cast

import pytest
import torch
from torch import fx, nn
from torch.testing import assert_close

import batchnorm as bn
from tests.mutations.mutation import Mutation
from tests.passes.blocks import X
from tests.passes.compare import same, unlike

ON_META = torch.device("meta")


def identities(model):
    """What must come back: objects, classes, names and order of everything, and what is seen of it."""
    return [
        str(model),
        [(name, id(each), type(each), each.training) for name, each in model.named_modules()],
        [(name, id(each)) for name, each in model.named_parameters()],
        [(name, id(each)) for name, each in model.named_buffers()],
        list(model.state_dict()),
        pickle.dumps(model),
    ]


def anatomy(model):
    """What two models of equal make have in common."""
    return str(model), list(model.state_dict()), [(type(each), [*vars(each)]) for each in model.modules()]


def comes_back(model):
    """Upgrade and downgrade `model`, and compare; the number of layers."""
    before = identities(model)
    bn.upgrade(model)
    model, report = bn.downgrade(model)
    assert report.count("downgraded") > 0
    for one, other in zip(identities(model), before, strict=True):
        assert one == other
    return report


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)) + x)


def network():
    return nn.Sequential(
        Block(), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU(0.2)), nn.BatchNorm2d(3)
    )


# --- after upgrade


def test_an_upgraded_network_comes_back():
    report = comes_back(unlike(network()))
    assert str(report).splitlines() == [
        "0.norm  downgraded  BatchNorm2d, relu",
        "1.1     downgraded  BatchNorm2d, LeakyReLU(negative_slope=0.2)",
        "2       downgraded  BatchNorm2d",
        "3 layers: 3 downgraded",
    ]


def test_it_comes_back_from_a_copy_and_from_a_pickle():
    theirs = unlike(network().double())
    for again in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        ours, _ = bn.upgrade(copy.deepcopy(theirs))
        ours, report = bn.downgrade(again(ours))
        assert report.summary == "3 layers: 3 downgraded"
        assert anatomy(ours) == anatomy(theirs)
        assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_it_comes_back_with_what_it_has_learnt_since():
    ours, _ = bn.upgrade(unlike(network()))
    ours(X.float()).sum().backward()
    state, x = copy.deepcopy(ours.state_dict()), X.float()
    expected = copy.deepcopy(ours).eval()(x)
    ours, _ = bn.downgrade(ours)
    assert_close(ours.state_dict(), state, rtol=0, atol=0)
    assert_close(ours.eval()(x), expected)


def test_it_can_be_upgraded_and_downgraded_again():
    model = unlike(network())
    for _ in range(2):
        comes_back(model)


def test_hooks_flags_and_attributes_stay():
    model: Any = network()
    seen = []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    model[2].weight.requires_grad_(False)
    vars(model[2])["qconfig"] = "somebody's"
    model[1].eval()
    bn.upgrade(model)
    bn.downgrade(model)
    model(X.float())
    assert seen == [1] and not model[2].weight.requires_grad and model[2].qconfig == "somebody's"
    assert [each.training for each in model] == [True, False, True]
    assert not model[1][2].training


def test_the_dtype_of_the_statistics_comes_back():
    comes = network().bfloat16()
    before = copy.deepcopy(comes.state_dict())
    bn.upgrade(comes)
    assert comes[2].running_mean.dtype == torch.float32
    bn.downgrade(comes)
    assert_close(comes.state_dict(), before)


def test_its_pickle_is_loaded_where_batchnorm_is_not(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    bn.upgrade(model)
    bn.downgrade(model)
    torch.save(model, tmp_path / "model.pt")
    code = "import sys; sys.modules['batchnorm'] = None; import torch; torch.load(sys.argv[1], weights_only=False)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True)


def test_an_identity_whose_layer_was_given_another_activation_stays():
    model, _ = bn.upgrade(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    cast(Any, model[0]).activation = "tanh"
    model, _ = bn.downgrade(model)
    assert [type(each) for each in model] == [nn.BatchNorm2d, nn.Tanh, nn.Identity]


def test_where_a_layer_was_replaced_its_activation_comes_back():
    model, _ = bn.upgrade(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)))
    model[0] = nn.InstanceNorm2d(3)
    model, _ = bn.downgrade(model)
    assert type(model[1]) is nn.ReLU


@pytest.mark.parametrize("upgraded_first", [True, False])
def test_a_graph_adds_and_activates_by_itself_again(upgraded_first):
    theirs = unlike(network().double())
    model = copy.deepcopy(theirs)
    if upgraded_first:
        bn.upgrade(model)
    model = fx.symbolic_trace(model)
    if not upgraded_first:
        bn.upgrade(model)
    model, report = bn.downgrade(model)
    assert report.count("downgraded") == 3
    model.graph.lint()
    for training in (True, False):
        assert_close(model.train(training)(X), theirs.train(training)(X))
    assert not any(type(each).__module__.startswith("batchnorm") for each in model.modules())
    assert "batchnorm" not in model.code


# --- other models


def test_an_activation_of_the_constructor_gets_a_module_of_its_own():
    ours = nn.Sequential(
        nn.Conv2d(3, 3, 1), bn.BatchNorm2d(3, activation="silu"), nn.Conv2d(3, 3, 1)
    ).double()
    expected, keys = ours(X), list(ours.state_dict())
    ours, report = bn.downgrade(ours)
    assert list(ours.state_dict()) == keys
    assert [name for name, _ in ours.named_children()] == ["0", "1", "1_activation", "2"]
    assert report["1"].what == "BatchNorm2d, silu"
    assert_close(ours(X), expected)


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_each_class_becomes_torch_s(kind):
    ours, theirs = getattr(bn, f"BatchNorm{kind}d"), getattr(nn, f"BatchNorm{kind}d")
    layer, report = bn.downgrade(ours(3, eps=1e-3, momentum=None))
    assert (
        type(layer) is theirs
        and str(report) == f"(the model)  downgraded  BatchNorm{kind}d\n1 layer: 1 downgraded"
    )
    assert anatomy(layer) == anatomy(theirs(3, eps=1e-3, momentum=None))


def test_sync_becomes_torch_s_or_the_layer_by_itself():
    for sync, kind in ((True, nn.SyncBatchNorm), (False, nn.BatchNorm2d)):
        layer, _ = bn.downgrade(bn.BatchNorm2d(3, statistics=bn.Sync()), sync=sync)
        assert type(layer) is kind
        assert anatomy(layer) == anatomy(kind(3))


def test_torch_s_sync_batch_norm_comes_back():
    theirs = nn.Sequential(nn.SyncBatchNorm(3, process_group="somebody's"))
    before = pickle.dumps(theirs)
    bn.convert_sync(theirs)
    assert type(theirs[0]) is bn.BatchNorm
    bn.downgrade(theirs)
    assert pickle.dumps(theirs) == before


def test_a_frozen_layer_evaluates_until_the_next_train():
    theirs = unlike(network().double())
    ours, _ = bn.freeze(copy.deepcopy(theirs))
    expected = ours.train()(X)
    ours, report = bn.downgrade(ours)
    assert report["2"].why == "in evaluation mode, until the next .train()"
    assert ours.training and not ours[2].training
    assert_close(ours(X), expected)


def test_what_is_torch_s_already_is_left_alone():
    model = network()
    before = pickle.dumps(model)
    _, report = bn.downgrade(model)
    assert report.summary == "3 layers: 3 left alone"
    assert report["2"].why == "is BatchNorm2d of torch.nn.modules.batchnorm"
    assert pickle.dumps(model) == before


class Shifted(bn.BatchNorm2d):
    def forward(self, *args):
        return super().forward(*args) + 1


class Caller(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = bn.BatchNorm2d(3, activation="relu")

    def forward(self, x):
        return self.norm(x, x)


def in_a_domain():
    layer = bn.BatchNorm2d(3)
    with bn.domain("night"):
        layer(X.float())
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: bn.BatchNorm2d(3, statistics=bn.Ghost(2)), "1 has statistics=Ghost(size=2)"),
        (lambda: bn.freeze(bn.BatchNorm2d(3, statistics=bn.Renorm()))[0], "1 has statistics=Renorm"),
        (lambda: bn.BatchNorm((3, 4, 4)), "1 has statistics for every activation, num_features=(3, 4, 4)"),
        (lambda: bn.BatchNorm(3), "1 takes inputs of any rank"),
        (in_a_domain, "1 has running statistics of domains: night"),
        (lambda: bn.BatchNorm2d(3, debiased=True), "1 is debiased"),
        (lambda: bn.BatchNorm2d(3, on_single="running"), '1 has on_single="running"'),
        (lambda: Shifted(3), "1 is Shifted of tests.passes.test_downgrade, not exactly a layer of ours"),
        (bn.LazyBatchNorm2d, "1 is lazy: run a batch through the model first"),
        (Caller, "1.norm has activation='relu', and Caller calls it"),
        (lambda: bn.BatchNorm2d(3, activation=torch.sin), "1 has activation=<built-in method sin"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name_before_anything_changes(make, why):
    model = nn.Sequential(network(), make())
    bn.upgrade(model[0])
    before = pickle.dumps(model)
    with pytest.raises(ValueError, match="these layers cannot become torch's: ") as refused:
        bn.downgrade(model)
    assert why in str(refused.value)
    assert pickle.dumps(model) == before


def test_a_layer_by_itself_has_no_place_for_its_activation():
    with pytest.raises(ValueError, match="the model itself has activation='relu', and nothing calls it"):
        bn.downgrade(bn.BatchNorm2d(3, activation="relu"))


def test_only_a_module_can_be_downgraded():
    with pytest.raises(TypeError, match=r"downgrade takes a torch\.nn\.Module, not type"):
        bn.downgrade(bn.BatchNorm2d)  # type: ignore[type-var]


# --- the zoos


def test_timm_s_layer_comes_back_with_its_activation():
    layer = pytest.importorskip("timm.layers").BatchNormAct2d
    comes_back(nn.Sequential(*(layer(3, act_layer=act) for act in (nn.ReLU, nn.SiLU, nn.PReLU, nn.Identity))))
    model, _ = bn.upgrade(nn.Sequential(layer(3)))
    cast(Any, model[0]).activation = None
    with pytest.raises(ValueError, match="0 has activation=None, but its act is ReLU"):
        bn.downgrade(model)


TORCHVISION = [
    "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2",
    "mobilenet_v3_large", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "vgg11_bn", "deeplabv3_resnet50",
    "lraspp_mobilenet_v3_large", "r2plus1d_18", "s3d", "quantized_mobilenet_v2", "quantized_resnet18",
]  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_network_of_torchvision_comes_back(name):
    models = pytest.importorskip("torchvision").models
    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name.startswith(("deeplab", "lraspp")):
        options["weights_backbone"] = None
    with ON_META:
        model = models.get_model(name, **options)
    comes_back(model)


TIMM = [
    "convit_tiny", "crossvit_9_240", "cspresnet50", "densenet121", "dla34", "dpn48b", "efficientnet_b0",
    "fastvit_t8", "fbnetc_100", "ghostnet_050", "hardcorenas_a", "hrnet_w18_small", "levit_128s",
    "mixnet_s", "mobilenetv3_small_050", "mobilevit_xxs", "regnety_002", "repvgg_a0", "repvit_m0_9",
    "res2net50_14w_8s", "resnet18", "resnetv2_50", "rexnet_100", "selecsls42", "skresnet18", "tf_efficientnet_lite0",
    "vovnet39a", "xception41",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_comes_back(name):
    timm = pytest.importorskip("timm")
    with ON_META:
        model = timm.create_model(name)
    if any("BatchNorm" in type(each).__name__ for each in model.modules()):
        comes_back(model)


@pytest.mark.slow
def test_a_network_that_came_back_computes_as_before():
    models = pytest.importorskip("torchvision").models
    theirs = unlike(models.resnet18(num_classes=4).double())
    ours, _ = bn.downgrade(bn.upgrade(copy.deepcopy(theirs))[0])
    same(ours, theirs, torch.randn(2, 3, 64, 64).double(), tolerance=1e-12)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    assert b"batchnorm." not in buffer.getvalue().replace(b"torch.nn.modules.batchnorm", b"")


MUTATIONS = [
    Mutation(
        "an Identity forgets what it stands for", "passes/upgrade.py",
        "owner._modules[name] = stand_in(Fused(follower, layer, activation))",
        "owner._modules[name] = nn.Identity().train(follower.training)",
        "an activation of another object at another place",
    ),
    Mutation(
        "statistics stay wide", "passes/swap.py",
        "    narrow(layer)\n", "",
        "a state_dict of other dtypes",
    ),
    Mutation(
        "the counter stays", "passes/swap.py",
        "for name in (*ours.keys() - theirs.keys(), \"activation\", \"restorable\"):", "for name in ():",
        "torch's layer has attributes of ours",
    ),
    Mutation(
        "a frozen layer trains", "passes/downgrade.py",
        "layer.training = False", "pass",
        "statistics that were frozen move",
    ),
    Mutation(
        "a graph keeps its residual in the layer", "graph/rewrite.py",
        "new = graph.call_function(operator.add, (new, residual))", "pass",
        "torch's layer adds nothing",
    ),
]  # fmt: skip
