"""`examine` on models of all kinds: what it leaves as it was, what it takes, how it is told what to look for."""

import contextlib
import copy
import json
import random
import warnings
from typing import Any

import numpy
import pytest
import timm
import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

import batchnorm as bn
from tests.diagnostics.networks import Own, batches, healthy
from tests.diagnostics.test_checks import serious
from tests.mutations.mutation import Mutation


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def measured(model, data, forward=None):
    bn.population(model, data, forward=forward)
    return model.train()


def everything(model, optimizer):
    """All that an examination might change."""
    drawn: Any = numpy.random.get_state()
    return {
        "state": copy.deepcopy(model.state_dict()),
        "identities": [
            (name, id(each)) for name, each in [*model.named_parameters(), *model.named_buffers()]
        ],
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [
            [
                list(getattr(module, name))
                for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            ]
            for module in model.modules()
        ],
        "gradients": [None if each.grad is None else each.grad.clone() for each in model.parameters()],
        "required": [each.requires_grad for each in model.parameters()],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "random": (torch.get_rng_state(), random.getstate(), drawn[1].tolist()),
    }


def assert_same(before, after):
    for key in ("identities", "modes", "attributes", "hooks", "required"):
        assert before[key] == after[key], key
    assert all(torch.equal(before["state"][name], after["state"][name]) for name in before["state"])
    for one, other in zip(before["gradients"], after["gradients"], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert json.dumps(before["optimizer"], default=str) == json.dumps(after["optimizer"], default=str)
    assert torch.equal(before["random"][0], after["random"][0])
    assert before["random"][1:] == after["random"][1:]


class Noisy(Own):
    """Draws from all generators, keeps something, and fails when it is told to."""

    fails = False

    def forward(self, x):
        random.random(), numpy.random.rand(), torch.rand(1)
        self.last = x
        if self.fails and self.training:
            raise RuntimeError("it fails")
        return super().forward(x)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_all_is_as_it_was(training, fails):
    model, data, optimizer = healthy(Noisy)
    model.register_forward_hook(lambda *_: None)
    model.stem[1].eval()
    model(data[0]).sum().backward()
    optimizer.step()
    if fails == training:
        optimizer.zero_grad()  # no gradients
    model.train(training)
    model.norms[0].train(not training)
    model.fails = fails
    model.convs[0].weight.requires_grad_(False)
    before = everything(model, optimizer)
    found = bn.examine(model, data, optimizer)
    assert_same(before, everything(model, optimizer))
    assert [each.layer for each in found if each.code == "BN204"] == ["norms.0"]
    assert ("BN303" in found.skipped) == fails


def test_batches_are_not_changed():
    class InPlace(Own):
        def forward(self, x):
            return super().forward(x.mul_(0.5))

    model, data, _ = healthy(InPlace)
    before = [each.clone() for each in data]
    bn.examine(model, data)
    assert all(torch.equal(one, other) for one, other in zip(before, data, strict=True))


def dictionary(data):
    class Named(Own):
        def forward(self, pixels, scale=1.0):
            return {"logits": super().forward(pixels * scale)}

    return Named(), [{"pixels": each, "scale": 1.0} for each in data], None


def pairs(data):
    return Own(), [(each, torch.zeros(len(each))) for each in data], None


def loader(data):
    images = torch.cat(data)
    return Own(), DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=16), None


def own_forward(data):
    class Strange(Own):
        def forward(self, *, first, second):  # type: ignore[override]
            return super().forward(first + second)

    return Strange(), data, lambda model, batch: model(first=batch, second=0.0)


@pytest.mark.parametrize("kind", [dictionary, pairs, loader, own_forward], ids=lambda each: each.__name__)
def test_batches_of_all_kinds(kind):
    torch.manual_seed(0)
    model, given, forward = kind(batches())
    measured(model, given, forward)
    assert serious(bn.examine(model, given, forward=forward)) == []
    model.norms[1].running_mean += 2
    found = bn.examine(model, given, forward=forward)
    assert serious(found) == [("BN405", "norms.1")]


def test_an_iterator_gives_no_more_than_the_limit():
    data = batches()
    model = measured(Own(), data)
    taken = []

    def endless():
        for number in range(10**9):
            taken.append(number)
            yield data[number % 4] + number

    bn.examine(model, endless(), limit=3)
    assert taken == [0, 1, 2]


def test_of_a_list_the_last_batch_is_used_too():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8))
    data = [torch.randn(16, 12) for _ in range(20)]
    measured(model, data)
    found = bn.examine(model, [*data, torch.randn(1, 12)])
    assert serious(found) == [("BN401", "2")] and found[0].evidence["batch"] == 7


def test_the_last_batch_of_a_loader_is_known_without_reading_it():
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    data = torch.randn(16 * 20 + 1, 12)
    measured(model, data[:-1].split(16))
    dataset = TensorDataset(data)
    assert serious(bn.examine(model, DataLoader(dataset, batch_size=16))) == [("BN401", "1")]
    assert serious(bn.examine(model, DataLoader(dataset, batch_size=16, drop_last=True))) == []
    images = nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    measured(images, data[:-1].split(16))
    assert serious(bn.examine(images, DataLoader(dataset, batch_size=16))) == []  # four positions: it trains


def test_one_tensor_is_no_list_of_batches():
    with pytest.raises(
        TypeError, match=r"batches must be a list or a loader of batches, got one Tensor: \[batch\]"
    ):
        bn.examine(small(), torch.randn(8, 3, 16, 16))


def planted(model):
    layers: list[Any] = [
        each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)
    ]
    layers[1].momentum = 0.99
    layers[1].running_mean.add_(2)
    return model


def compiled():
    return torch.compile(planted(measured(Own(), batches())), backend="eager"), "_orig_mod.norms.0"


def compiled_inside():
    model = planted(measured(Own(), batches()))
    model.stem = torch.compile(model.stem, backend="eager")
    return model, "norms.0"


def graph_module():
    return planted(fx.symbolic_trace(measured(Own(), batches()))).train(), "norms.0"


def averaged():
    model = torch.optim.swa_utils.AveragedModel(measured(Own(), batches()))
    return planted(model), "module.norms.0"


def data_parallel():
    return nn.DataParallel(planted(measured(Own(), batches()))), "module.norms.0"


def upgraded():
    return planted(bn.upgrade(measured(Own(), batches()))[0]), "norms.0"


@pytest.mark.parametrize(
    "make",
    [compiled, compiled_inside, graph_module, averaged, data_parallel, upgraded],
    ids=lambda each: each.__name__,
)
def test_what_others_have_wrapped(make):
    torch.manual_seed(0)
    model, path = make()
    data = batches()
    found = bn.examine(model, data)
    assert serious(found) == [("BN201", path)]
    model.get_submodule(path).momentum = 0.1
    found = bn.examine(model, data)
    assert serious(found) == [("BN405", path)]


def test_a_scripted_model_is_examined_as_far_as_it_goes():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(measured(small(), batches()))
    getattr(model, "1").running_var[2] = -1
    found = bn.examine(model, batches())
    assert [(each.code, each.layer) for each in found if each.severity == "error"] == [("BN202", "1")]
    assert found.skipped["BN405"]


def test_a_traced_model_in_training_mode():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(measured(Own(), batches()), batches()[0], check_trace=False)
        right = torch.jit.trace(measured(Own(), batches()).eval(), batches()[0])
    assert {each.layer for each in bn.examine(traced, select=["BN601"])} == {"stem.1", "norms.0", "norms.1"}
    assert not bn.examine(right, select=["BN601"])


@pytest.mark.parametrize("training", [False, True])
def test_an_exported_program(training):
    model = measured(Own(), batches()).train(training)
    program = torch.export.export(model, (batches()[0],)).module(check_guards=False)
    found = bn.examine(program, select=["BN601"])
    assert {each.layer for each in found} == ({"stem.1", "norms.0", "norms.1"} if training else set())


def test_detection():
    torch.manual_seed(0)
    model = models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    images = [[torch.rand(3, 120, 160) for _ in range(4)] for _ in range(3)]

    def forward(model, batch):
        boxes = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}
        return model(batch, [boxes] * len(batch)) if model.training else model(batch)

    measured(model, images, forward)
    alone: dict[str, Any] = {
        "forward": forward,
        "ignore": ["BN402"],
    }  # its last feature maps have one position
    assert serious(bn.examine(model, images, **alone)) == []
    path = "backbone.features.0.4.block.0.1"
    layer = model.get_submodule(path)
    layer.running_var *= 9
    found = bn.examine(model, images, **alone)
    assert serious(found) == [("BN405", path)]
    assert found.skipped.keys().isdisjoint({"BN101", "BN303", "BN405"})


def test_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    model = transformers.ResNetForImageClassification(config)
    data = [{"pixel_values": each} for each in batches()]
    measured(model, data)
    assert serious(bn.examine(model, data)) == []
    layers = [path for path, each in model.named_modules() if isinstance(each, nn.BatchNorm2d)]
    model.get_submodule(layers[2]).running_mean += 3
    assert serious(bn.examine(model, data)) == [("BN405", layers[2])]


def test_frozen_layers_of_every_kind_are_left_alone():
    from torchvision.ops import FrozenBatchNorm2d

    data = batches()
    model = measured(Own(), data)
    model.norms[0] = FrozenBatchNorm2d(8)
    bn.freeze(model.norms[1], affine=True)
    assert serious(bn.examine(model, data)) == []
    assert (
        serious(bn.examine(bn.freeze(measured(Own(), data), affine=True)[0].requires_grad_(False), data))
        == []
    )


def test_select_and_ignore():
    model = planted(measured(Own(), batches()))
    model.stem[1].momentum = 0.99
    assert {each.layer for each in bn.examine(model, select=["BN201"])} == {"stem.1", "norms.0"}
    assert {each.layer for each in bn.examine(model, select=["momentum"])} == {"stem.1", "norms.0"}
    assert {each.layer for each in bn.examine(model, ignore={"stem.*": ["BN201"]}, select=["BN2"])} == {
        "norms.0"
    }
    assert not bn.examine(model, ignore=["BN2"]).of("warning")
    assert "BN405" not in bn.examine(model, ignore=["BN4"]).skipped
    for wrong in ({"select": ["BN9"]}, {"ignore": ["BN9"]}, {"ignore": {"*": ["BN9"]}}, {"select": [""]}):
        with pytest.raises(ValueError, match=r"there is no check '(BN9)?': BN101 redundant-bias"):
            bn.examine(model, **wrong)
    with pytest.raises(ValueError, match="use must be one of training, inference"):
        bn.examine(model, use="deployment")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is lazy: run a batch through the model first"):
        bn.examine(nn.Sequential(nn.LazyBatchNorm1d()))


def test_findings_show_themselves():
    model = measured(Own(), batches())
    model.norms[0].momentum = 0.99
    model.norms[1].running_var[0] = -1
    found = bn.examine(model)
    assert [each.code for each in found] == ["BN202", "BN201"] and found.summary.startswith(
        "1 error, 1 warning; "
    )
    assert found.at("norms.1")[0].evidence == {"channels": 1}
    assert "<td style='text-align:left'>norms.1</td>" in found._repr_html_()
    again = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [each["layer"] for each in again["findings"]] == ["norms.1", "norms.0"] and again[
        "skipped"
    ] == found.skipped
    assert (
        str(found)
        .splitlines()[0]
        .startswith("BN202  error    norms.1  1 channel of it with a negative variance; ")
    )
    nothing = bn.examine(nn.Linear(2, 2))
    assert nothing.summary.startswith("nothing found")
    mended = bn.examine(model, batches(), fix=True)
    assert str(mended).splitlines()[:2] == [
        "fixed BN202 norms.1: running statistics → those of 64 examples in 4 batches",
        "fixed BN201 norms.0: momentum 0.99 → 0.01",
    ]


def test_without_batches_the_structure_is_seen_on_a_made_up_input():
    cases = [
        nn.Sequential(nn.Conv1d(5, 8, 3), nn.BatchNorm1d(8)),
        nn.Sequential(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8)),
        nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8)),
        nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8)),
        nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8)),
        nn.Sequential(nn.ConvTranspose2d(16, 8, 4), nn.BatchNorm2d(8)),
    ]
    for model in cases:
        found = bn.examine(model.double())
        assert [each.layer for each in found if each.code == "BN101"] == [str(len(model) - 1)]

    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.BatchNorm1d(3)

        def forward(self, graph):
            return self.layer(graph.nodes)

    assert "what it takes is not known" in bn.examine(Takes()).skipped["BN101"]


def test_a_loss_and_training_go_on_as_without_it():
    results = []
    for looks in (False, True):
        torch.manual_seed(0)
        model, data, optimizer = healthy(lambda: timm.create_model("mobilenetv3_small_050", drop_rate=0.2))
        for step in range(3):
            if looks and step == 1:
                bn.examine(model, data, optimizer)
            optimizer.zero_grad()
            loss = model(data[step]).square().mean()
            loss.backward()
            optimizer.step()
        results.append(loss.detach())
    assert torch.equal(*results)


def test_gradients_that_act_in_the_backward_pass_are_not_called():
    model, data, _ = healthy(Own)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: parameter.data.mul_(0))
    before = copy.deepcopy(model.state_dict())
    found = bn.examine(model, data)
    assert "hooks of parameters" in found.skipped["BN303"]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@contextlib.contextmanager
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_in_ddp(tmp_path):
    with one_process(tmp_path):
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(measured(Own(), batches()))
        found = bn.examine(planted(model), batches())
        assert serious(found) == [("BN201", "module.norms.0")]
        model.module.norms[0].momentum = 0.1
        model.module.norms[0].running_mean -= 2  # as it was
        assert serious(bn.examine(model, batches())) == []
        few = [each[:2, :, :4, :4] for each in batches()]
        found = bn.examine(model, few, select=["BN402", "BN502"])
        assert {code for code, _ in serious(found)} == {"BN502"}  # and not BN402, which it explains
        model(batches()[0]).sum().backward()  # its reducer is not confused


def test_small_batches_by_their_values_and_their_noise():
    torch.manual_seed(0)
    model = measured(models.resnet18(num_classes=4), batches(4, 16))

    def found(examples, size):
        return bn.examine(model, batches(4, examples, size), select=["BN402"])

    assert {each.layer.split(".")[0] for each in found(2, 32).of("warning")} >= {"layer4"}
    assert all(each.evidence["values"] < 64 for each in found(2, 32))
    (one,) = found(5, 128)
    assert one.severity == "info" and one.layer == "" and one.evidence["examples"] == 5
    assert not found(16, 64)


def test_data_of_another_domain_are_one_finding():
    torch.manual_seed(0)
    data = batches()
    model = measured(models.resnet18(num_classes=4), data)
    found = bn.examine(model, [each * 0.3 + 1 for each in data])
    assert serious(found) == [("BN405", "bn1")] and "domain" in found[0].message
    in_order = [torch.randn(16, 3, 64, 64) * (1 + number) + number for number in range(4)]
    assert serious(bn.examine(model, in_order)) == [("BN403", "")]


def test_heads_of_training_alone_need_no_statistics():
    torch.manual_seed(0)
    model = models.googlenet(num_classes=4, init_weights=False)
    data = batches(2, 16)
    bn.population(model, data)
    layer = model.aux1.conv.bn
    assert int(layer.num_batches_tracked) == 0
    assert serious(bn.examine(model.train(), data)) == [] == serious(bn.examine(model.eval()))


def test_few_steps_are_told_from_measured_statistics():
    torch.manual_seed(0)
    data = batches()
    model = Own()
    for layer in (model.stem[1], *model.norms):
        layer.momentum = 0.01
    for batch in data[:3]:
        model(batch)
    found = bn.examine(model, data)
    assert {each.code for each in found.of("warning")} == {"BN214"} and len(found.of("warning")) == 3
    assert {each.severity for each in bn.examine(model) if each.code == "BN214"} == {"info"}
    mended = bn.examine(model, data, fix=True)
    assert len(mended.fixed) == 3 and serious(mended) == []


def test_without_batches_a_layer_without_statistics_is_found():
    model = Own()
    model.norms[1] = nn.BatchNorm2d(8, track_running_stats=False)
    assert serious(bn.examine(model)) == [("BN410", "norms.1")]

    class Mixes(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    model = measured(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), Mixes()), batches())
    assert serious(bn.examine(model, batches())) == [("BN410", "2")]


def test_a_folded_layer_behind_a_convolution_with_a_bias():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    data = [each * 3 for each in batches()]
    for affine in (False, True):
        if affine:
            nn.init.uniform_(model[1].weight, 2, 4)
            nn.init.uniform_(model[1].bias, 1, 2)
        bn.population(model, data)
        assert serious(bn.examine(model.train(), data)) == []
        folded = copy.deepcopy(model)
        folded[0] = nn.utils.fusion.fuse_conv_bn_eval(model[0].eval(), model[1].eval())
        assert serious(bn.examine(folded.train(), data)) == [("BN213", "1")]


def test_small_examples_of_healthy_networks_are_not_stale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    measured(model, torch.randn(4096, 12).split(512))
    for _ in range(20):  # 12 examples: by chance 0.3 standard deviations
        assert "BN405" not in {each.code for each in bn.examine(model, torch.randn(12, 12).split(6))}


class Functional(nn.Module):
    """What a forward calls without a module."""

    def __init__(self, between):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.one = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, bias=False)
        self.two = nn.BatchNorm2d(8)
        self.between = between
        self.before = "second" in between.__code__.co_names if between else False

    def forward(self, x):
        x = torch.relu(self.one(self.first(x)))
        x = self.between(self, x)
        return torch.relu(self.two(x if self.before else self.second(x)))


@pytest.mark.parametrize(
    ("between", "found"),
    [
        (lambda model, x: F.dropout(model.second(x), 0.3, model.training), ("BN102", "two")),
        (lambda model, x: F.dropout2d(model.second(x), 0.3, model.training), ("BN102", "two")),
        (lambda model, x: F.local_response_norm(x, 3), ("BN104", "")),
        (lambda model, x: F.dropout(x, 0.3, False), None),
        (lambda model, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), None),
        (lambda model, x: x / (x.square().mean() + 1).pow(0.5), None),
    ],
)
def test_dropout_and_response_normalization_by_functions(between, found):
    model = measured(Functional(between), batches())
    expected = [] if found is None else [found]
    for training in (True, False):
        assert serious(bn.examine(model.train(training), select=["BN1"])) == expected
    if found == ("BN102", "two"):
        assert bn.examine(model, select=["BN102"])[0].evidence["p"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "between", [nn.Identity(), nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.ReLU(), nn.AvgPool2d(2)]
)
def test_dropout_before_a_convolution_is_information(between):
    model = measured(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.4), between,
            nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8),
        ),
        batches(),
    )  # fmt: skip
    (found,) = bn.examine(model, select=["BN102"])
    assert (found.layer, found.severity, found.evidence["p"]) == ("6", "info", 0.4)


@pytest.mark.parametrize("given", [False, True])
def test_a_siamese_network_shares_its_layers_rightly(given):
    class Pair(Own):
        domain = 1.0

        def forward(self, x):
            return super().forward(x) + super().forward(x.flip(0) * self.domain)

    class Places(Functional):
        def forward(self, x):
            return self.one(self.second(self.one(self.first(x))))

    data = [each * 3 for each in batches()]
    same, other = measured(Pair(), data), Pair()
    other.domain = 3.0
    measured(other, data)
    places = measured(Places(None), data)
    shown = data if given else None
    alike = bn.examine(same, shown, select=["BN108", "BN403"])
    assert serious(alike) == [] and {each.layer for each in alike} == {"stem.1", "norms.0", "norms.1"}
    assert serious(bn.examine(places, shown, select=["BN108", "BN403"])) == [("BN108", "one")]
    if given:
        assert ("BN108", "stem.1") in serious(bn.examine(other, shown, select=["BN108"]))


def test_an_eps_of_two_layers_and_of_a_part():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8, eps=1e-3))
    assert serious(bn.examine(model, select=["BN211"])) == [("BN211", "3")]
    model = models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    assert [each.severity for each in bn.examine(model, select=["BN211"])] == ["info"]
    model.backbone["4"].block[1][1].eps = 1e-5
    assert serious(bn.examine(model, select=["BN211"])) == [("BN211", "backbone.4.block.1.1")]


def test_what_has_no_values_is_refused():
    with torch.device("meta"):
        model = Own()
    with pytest.raises(ValueError, match="on the meta device"):
        bn.examine(model)
    assert bn.examine(measured(Own(), batches()), [torch.randn(0, 3, 8, 8)]).skipped["BN405"]


def test_a_trace_in_training_mode_is_one_kind_of_finding():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(measured(Own(), batches()), batches()[0], check_trace=False)
    assert {code for code, _ in serious(bn.examine(traced, batches()))} == {"BN601"}


def test_reentrant_checkpoints_of_the_whole_network():
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
    )

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint_sequential(self.layers, 2, x, use_reentrant=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bn.examine(measured(Whole(), batches()), batches(), select=["BN303"])
    assert serious(found) == [("BN303", "layers.1")]  # the last part is not checkpointed


def test_statistics_of_the_last_model_that_was_averaged():
    torch.manual_seed(0)
    data = batches()
    model = measured(Own(), data)
    mean = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        model.convs[1].weight.mul_(8)
    for _ in range(9):
        mean.update_parameters(model)
    found = bn.examine(mean, data)
    assert (
        serious(found) == [("BN405", "module.norms.1")] and "last model that was averaged" in found[0].message
    )


def test_the_modes_of_scripted_parts_stay():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.part = torch.jit.script(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))

        def forward(self, x):
            return self.part(self.conv(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(measured(Own(), batches()).eval(), batches()[0])
        for model in (Part(), torch.jit.script(small()), traced):
            model.train()
            before = copy.deepcopy(model.state_dict())
            bn.examine(model, batches())
            assert all(getattr(module, "training", True) for module in model.modules())
            assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_rare_channel_is_not_said_to_be_dead():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(20, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    nn.init.constant_(model[1].bias, -1.8)
    few, many = torch.randn(64, 20).split(8), torch.randn(4000, 20).split(500)
    measured(model, few)
    assert "BN407" not in {code for code, _ in serious(bn.examine(model, few))}
    nn.init.constant_(model[1].bias, -20)
    assert serious(bn.examine(measured(model, few), few)) == [("BN407", "1")]
    nn.init.constant_(model[1].bias, -4.5)
    assert ("BN407", "1") in serious(bn.examine(measured(model, many), many))


def test_a_recurrence_is_called_with_other_inputs():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.state, self.norm = nn.Linear(8, 16), nn.Linear(16, 16), nn.BatchNorm1d(16)

        def forward(self, x):
            state = x.new_zeros(len(x), 16)
            for part in x.unbind(1):
                state = state + torch.relu(self.norm(self.step(part) + self.state(state)))
            return state

    torch.manual_seed(0)
    data = [torch.randn(32, 6, 8) for _ in range(4)]
    model = measured(Recurrent(), data)
    assert serious(bn.examine(model, data)) == [("BN108", "norm")]


def test_dynamic_quantization_is_no_leak():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        data = torch.randn(64, 12).split(16)
        measured(model, data)
        model = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear})
    assert serious(bn.examine(model, data, select=["BN410"])) == []


MUTATIONS = [
    Mutation(
        "gradients of a look stay", "diagnostics/intact.py",
        "                    parameter.grad = gradient\n", "                    pass\n",
        "the next step of the optimizer would use them",
    ),
    Mutation(
        "random numbers of a look are drawn", "diagnostics/intact.py",
        "            random.setstate(python)\n", "            pass\n",
        "a training would go on with other numbers because it was looked at",
    ),
    Mutation(
        "a model that changes its input changes the batches", "diagnostics/runs.py",
        "    return value.detach().clone() if isinstance(value, Tensor) else value\n", "    return value\n",
        "each pass would see other data",
    ),
    Mutation(
        "consequences are findings too", "diagnostics/examine.py",
        "if not is_explained(each)", "if True",
        "one bug would have many findings",
    ),
    Mutation(
        "statistics of few examples are stale by chance", "diagnostics/measured.py",
        "of_mean.square() / spread + (of_variance / spread / 2).square()", "0 * of_mean",
        "a healthy network would be ill in small batches",
        tests=("diagnostics/test_examine.py",),
    ),
    Mutation(
        "a leak is any module behind it", "diagnostics/neighbours.py",
        "        if unchanged and _change(made", "        if _change(made",
        "every later layer would be named",
    ),
    Mutation(
        "auxiliary heads must have statistics", "diagnostics/checks/reset.py",
        "subject.evaluated.items()", "subject.learning.items()",
        "GoogLeNet would be wrong whenever it is measured",
    ),
]  # fmt: skip
