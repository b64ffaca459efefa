"""`bn.insert`: where it puts layers, what they compute, what it leaves alone, and that a failure changes nothing."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

import batchnorm as bn
from tests.mutations.mutation import Mutation

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def insert(*arguments: Any, **named: Any) -> Any:
    return bn.insert(*arguments, **named)


def inserted(report):
    return [row.name for row in report.layers if row.outcome == "inserted"]


class Functional(nn.Module):
    """Activations that no module stands for, in a forward with control flow."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x):
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(torch.relu(conv(x)), 2) if x.shape[-1] > 8 else F.silu(conv(x))
        return self.fc2(torch.tanh(self.fc1(x.mean((2, 3)))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(a, 8, 3, padding=1) for a in (3, 8, 8))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu_(x + self.conv2(F.relu(self.conv1(x)))))


def test_it_computes_the_paper_s_transform():
    model = Functional().double()
    x = X.double()
    before = copy.deepcopy(model)
    model, report = insert(model, x)
    assert inserted(report) == ["conv1", "conv2", "fc1"]
    assert report["fc2"].why == "makes an output of the model"
    with torch.no_grad():
        for layer in (model.conv1, model.conv2, model.fc1):
            layer.norm.weight.uniform_(0.5, 2)
            layer.norm.bias.normal_()

    def normalised(old, new, x):
        y = old(x) - (old.bias if x.dim() == 2 else old.bias[:, None, None])
        return F.batch_norm(y, None, None, new.norm.weight, new.norm.bias, training=True)

    y = F.max_pool2d(torch.relu(normalised(before.conv1, model.conv1, x)), 2)
    y = F.max_pool2d(torch.relu(normalised(before.conv2, model.conv2, y)), 2)
    expected = before.fc2(torch.tanh(normalised(before.fc1, model.fc1, y.mean((2, 3)))))
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-9, atol=1e-9)


def test_names_classes_and_weights_stay():
    model, weights = Functional(), {}
    weights = model.state_dict()
    kinds = {name: type(each) for name, each in model.named_modules()}
    model, _ = insert(model, X)
    assert all(isinstance(model.get_submodule(name), kind) for name, kind in kinds.items())
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(unexpected) == {"conv1.bias", "conv2.bias", "fc1.bias"}
    assert all(".norm." in key for key in missing)
    assert repr(model.conv1).startswith("Conv2d(")


@pytest.mark.parametrize(
    ("name", "places", "left", "removed"),
    [("alexnet", 7, 1, 2), ("vgg11", 10, 1, 2), ("vgg16", 15, 1, 2), ("squeezenet1_1", 25, 1, 1)],
)
def test_networks_of_the_years_before(name, places, left, removed):
    model = models.get_model(name, weights=None)
    x = torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(model).eval()(x)
    model, report = insert(model, x, identity=[x])
    assert (report.count("inserted"), report.count("left alone"), report.count("removed")) == (
        places,
        left,
        removed,
    )
    for mode in (False, True):  # training moves the running statistics, by the first batch
        torch.testing.assert_close(model.train(mode)(x), before, rtol=1e-4, atol=1e-5)


def test_a_network_that_has_it_is_left_alone():
    model = models.resnet18()
    model.fc = nn.Sequential(nn.Dropout(), model.fc)
    keys = list(model.state_dict())
    model, report = insert(model, X)
    assert report.summary == "21 layers: 21 left alone"
    assert report["layer1.0.conv2"].why == "is normalised already, by layer1.0.bn2"
    assert list(model.state_dict()) == keys and isinstance(model.fc[0], nn.Dropout)


def test_of_a_sum_the_branches_are_normalised():
    model, report = insert(Residual(), X)
    assert inserted(report) == ["stem", "conv1", "conv2"]
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Parts(nn.Module):
    """All that is left alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.lstm, self.cell = nn.LSTM(16, 16, batch_first=True), nn.GRUCell(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)
        self.shared, self.plain = nn.Linear(16, 16), nn.Linear(16, 16)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.mlp, self.head = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x):
        x = F.gelu(self.norm(self.fc(self.plain(self.embed(x)))))
        x, _ = self.lstm(x)
        x, _ = self.attention(x, x, x)
        x = x + self.cell(x[:, 0])[:, None]
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean(1)))))[:, None]
        return torch.sigmoid(self.head(F.gelu(self.mlp(x))))


def test_what_is_left_alone_is_named():
    model, report = insert(Parts(), torch.randn(4, 7, 8))
    assert inserted(report) == ["mlp"]
    why = {row.name: row.why for row in report.layers if row.outcome == "left alone"}
    assert why == {
        "embed": "no nonlinearity that is known follows",
        "plain": "no nonlinearity that is known follows",
        "lstm": "is recurrent (LSTM)",
        "cell": "is recurrent (GRUCell)",
        "attention": "MultiheadAttention",
        "fc": "is normalised already, by norm",
        "shared": "is called 2 times, and the moments of each call are others",
        "squeeze": "makes weights of whole channels or positions (attention)",
        "excite": "makes weights of whole channels or positions (attention)",
        "head": "makes an output of the model",
    }
    assert model(torch.randn(4, 7, 8)).shape == (
        4,
        7,
        3,
    )  # a linear layer over positions: each feature over N·L values
    assert model.mlp.norm.num_features == 32


def test_a_linear_layer_over_positions_normalises_its_features():
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2)).double()
    x = torch.randn(4, 7, 6).double()
    weight: Any = model[0].weight
    model, _ = insert(model, x)
    y = F.batch_norm((x @ weight.T).flatten(0, 1), None, None, training=True).view(4, 7, 5)
    torch.testing.assert_close(model(x), model[2](F.gelu(y)))


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (nn.Conv1d(3, 4, 3), (4, 3, 9), "BatchNorm1d"),
        (nn.Conv2d(3, 4, 3), (4, 3, 9, 9), "BatchNorm2d"),
        (nn.Conv3d(3, 4, 3), (2, 3, 5, 5, 5), "BatchNorm3d"),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), (4, 3, 5, 5), "BatchNorm2d"),
        (nn.Linear(3, 4), (8, 3), "BatchNorm1d"),
    ],
)
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(inplace=True), nn.PReLU(), nn.GELU(), nn.Hardswish(), nn.Sigmoid(), nn.SELU(), nn.Softplus()],
)
def test_layers_of_each_rank_before_any_activation(layer, shape, kind, activation):
    model = nn.Sequential(copy.deepcopy(layer), activation, nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(shape)
    model(x)
    model, report = insert(model.eval(), x)
    assert report["0"].what == f"{kind}(4), its bias went"
    assert model[0].norm.training is False and model[0].bias is None


class OwnWeight(nn.Module):
    """A forward that calls the operation itself: only the activation is a module."""

    def __init__(self, activation):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
        self.act, self.head = activation, nn.Linear(4, 2)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return self.head(self.act(y) if self.act is not None else torch.tanh(y))


def test_the_input_of_an_activation_is_normalised_where_no_module_makes_it():
    x = torch.randn(8, 3)
    model, report = insert(OwnWeight(nn.Tanh()), x, identity=[x])
    assert inserted(report) == ["act"] and report["act"].what == "BatchNorm1d(4)"
    y = F.linear(x, model.weight, model.bias)
    torch.testing.assert_close(model(x), model.head(torch.tanh(y)), rtol=1e-4, atol=1e-5)
    assert abs(model.act.norm.running_mean - y.mean(0)).max() < 1e-5


def test_where_neither_is_a_module_that_is_said():
    _, report = insert(OwnWeight(None), torch.randn(8, 3))
    assert report[""].why == "its forward calls addmm itself, and no module returns what it makes"


def test_hooked_patched_parametrized_and_scripted_modules_are_left_alone():
    model: Any = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(5)), nn.Flatten()
    )
    model.append(nn.Linear(3 * 32 * 32, 2))
    model[0][0].register_forward_hook(lambda *_: None)
    model[1][0].forward = model[1][0].forward
    nn.utils.parametrizations.weight_norm(model[2][0])
    model[3][0].norm = None
    before = [type(each) for each in model.modules()]
    model, report = insert(model, X)
    assert inserted(report) == ["4.0"]
    assert report["0.0"].why == "has hooks, which would see its normalised output"
    assert report["1.0"].why == "its forward was replaced on the instance"
    assert "parametrizations" in report["2.0"].why
    assert report["3.0"].why == "has an attribute norm of its own"
    assert [type(each) for each in model.modules() if "BatchNorm" not in type(each).__name__][:-4] == before[
        :-4
    ]


def test_dropout_goes_weakens_or_stays():
    def model():
        return nn.Sequential(
            nn.Dropout(),
            nn.Conv1d(4, 4, 1),
            nn.ReLU(),
            nn.LocalResponseNorm(3),
            nn.Dropout(0.3),
            nn.Conv1d(4, 2, 1),
        )

    x = torch.randn(8, 4, 5)
    gone, report = insert(model(), x)
    assert [type(gone[at]).__name__ for at in (0, 3, 4)] == ["Identity"] * 3
    assert report.count("removed") == 3
    weak, report = insert(model(), x, dropout=0.1)
    assert (weak[0].p, weak[4].p) == (0.1, 0.1)
    assert (report["0"].outcome, report["0"].why, report["3"].outcome) == (
        "weakened",
        "0.5 to 0.1",
        "removed",
    )
    kept, report = insert(model(), x, dropout="keep")
    assert (kept[0].p, kept[4].p) == (0.5, 0.3)
    for wrong in (1.5, -0.1, "no"):
        with pytest.raises(ValueError, match="dropout must be"):
            insert(model(), x, dropout=wrong)


class DropsByFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = F.local_response_norm(torch.relu(self.fc(x))[..., None], 3)[..., 0]
        return self.head(F.dropout(y, 0.5, self.training))


def test_dropout_of_a_forward_stays_and_is_named():
    _, report = insert(nn.Sequential(DropsByFunction()), torch.randn(8, 4))
    assert inserted(report) == ["0.fc"]
    assert "in its forward, which stays" in report["0"].why and "dropout" in report["0"].why
    assert "local_response_norm" in report["0"].why


def test_where():
    def names(where):
        return inserted(insert(models.alexnet(num_classes=10), torch.randn(2, 3, 64, 64), where=where)[1])

    assert names("features.0") == ["features.0"]
    assert names("classifier") == ["classifier.1", "classifier.4"]
    assert names(["features.3", "classifier.*"]) == ["features.3", "classifier.1", "classifier.4"]
    assert names(nn.Linear) == ["classifier.1", "classifier.4"]
    assert names("features.1") == ["features.0"]  # by the nonlinearity
    assert len(names(nn.ReLU)) == 7
    assert names(lambda module: getattr(module, "stride", None) == (4, 4)) == ["features.0"]
    assert names(lambda name, module: getattr(module, "stride", None) == (4, 4)) == ["features.0"]
    assert names(["classifier.6"]) == [
        "classifier.6"
    ]  # in full, so that it is taken though it makes the output


def test_where_refuses_what_it_does_not_find():
    model = models.alexnet()
    before = list(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"where='layer1' is no module .* features\.0, features\.3"):
        insert(model, x, where="layer1")
    with pytest.raises(ValueError, match="names, classes or a function"):
        insert(model, x, where=[1])
    model.features[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"features\.0 cannot have a layer: it has hooks"):
        insert(model, x, where="features.0")
    assert list(model.state_dict()) == before


def test_identity_is_of_the_population_that_it_is_given():
    torch.manual_seed(0)
    model = models.vgg11(num_classes=10).double()
    batches = [torch.randn(6, 3, 32, 32).double() + number for number in range(3)]
    before = copy.deepcopy(model).eval()
    model, _ = insert(model, batches[0], identity=batches)
    whole = torch.cat(batches)
    for batch in batches:
        torch.testing.assert_close(model.eval()(batch), before(batch), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.train()(whole), before(whole), rtol=1e-9, atol=1e-12)
    norm = model.features[0].norm
    y = F.conv2d(whole, before.features[0].weight, padding=1)
    torch.testing.assert_close(norm.running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(norm.weight, (y.var((0, 2, 3), unbiased=False) + 1e-5).sqrt())


def test_after_identity_it_trains_at_a_rate_at_which_the_original_does_not():
    torch.manual_seed(0)
    x, wanted = torch.randn(256, 20), torch.randint(3, (256,))
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def last_loss(model, rate, steps):
        optimizer = torch.optim.SGD(model.parameters(), rate)
        for _ in range(steps):
            loss = F.cross_entropy(model.train()(x), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    last_loss(net, 0.1, 50)
    with_norm, _ = insert(copy.deepcopy(net), x, identity=[x])
    assert abs(F.cross_entropy(with_norm.train()(x), wanted) - F.cross_entropy(net(x), wanted)) < 1e-5
    assert not last_loss(net, 5.0, 100) < 0.5
    assert last_loss(with_norm, 5.0, 100) < 0.01


def test_the_rest_of_the_library_takes_what_it_makes():
    model, _ = insert(models.alexnet(num_classes=10), torch.randn(2, 3, 64, 64))
    x = torch.randn(8, 3, 64, 64)
    model(x)
    bn.population(model, [x])
    model.eval()
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
    folded, folds = bn.fold(model, x)
    assert folds.count("folded") == 7
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    state, _ = bn.fold(model, x, into="state_dict")
    plain = models.alexnet(num_classes=10).eval()
    assert not plain.load_state_dict(state, strict=True).missing_keys
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    upgraded, report = bn.upgrade(copy.deepcopy(model))
    assert report["features.0.norm"].what == "relu"
    torch.testing.assert_close(upgraded(x), model(x))
    down, _ = bn.downgrade(copy.deepcopy(model))
    assert type(down.features[0].norm) is nn.BatchNorm2d
    torch.testing.assert_close(down(x), model(x), rtol=1e-4, atol=1e-5)
    _, normalization, _ = bn.param_groups(model, 1e-4)
    assert {id(p) for p in normalization["params"]} == {
        id(p) for name, p in model.named_parameters() if ".norm." in name
    }
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_options_and_dtypes():
    model = models.alexnet().bfloat16()
    model, _ = insert(
        model, torch.randn(2, 3, 64, 64).bfloat16(), options={"eps": 1e-3, "statistics": bn.Ghost(4)}
    )
    norm = model.features[0].norm
    assert (norm.eps, norm.statistics, norm.weight.dtype) == (1e-3, bn.Ghost(4), torch.bfloat16)


def test_a_bias_that_others_have_too_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].bias = model[0].bias
    model, report = insert(model, torch.randn(8, 4))
    assert model[0].bias is model[2].bias is not None
    assert report["0"].what == "BatchNorm1d(4)"


def test_nothing_is_changed_by_a_failure_or_by_looking():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = models.alexnet()

        def forward(self, x):
            if x.shape[0] == 3:
                raise RuntimeError("three")
            return self.net(x)

    model = Fails()
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    for attempt in (
        lambda: insert(model, torch.randn(3, 3, 64, 64)),
        lambda: insert(model, torch.zeros(2, 3, 64, 64), identity=[torch.randn(3, 3, 64, 64)]),
        lambda: insert(model, torch.zeros(2, 3, 64, 64), identity=[]),
        lambda: insert(model, torch.zeros(2, 3, 64, 64), options={"affine": False}, identity=[X[:, :, :, :]]),
        lambda: insert(model, torch.zeros(2, 3, 64, 64), options={"absurd": 1}),
    ):
        torch.set_rng_state(random)
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            attempt()
        assert model.training and list(model.state_dict()) == list(state)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_models_that_are_refused():
    class FullyShardedDataParallel(nn.Sequential):
        pass

    with pytest.raises(ValueError, match="would not synchronise new parameters"):
        insert(FullyShardedDataParallel(nn.Linear(2, 2)), torch.randn(4, 2))
    with pytest.raises(ValueError, match="compiled"):
        insert(torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), torch.randn(4, 2))
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        insert(nn.Linear, torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"one value per channel|more than 1 value") as raised:
        insert(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.randn(1, 2))
    assert "a batch to train on" in raised.value.__notes__[0]


def test_the_fast_path_of_a_transformer_s_layer_still_works():
    x = torch.randn(4, 5, 16)
    model, report = insert(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), x)
    assert inserted(report) == [] and "fast path" in report["linear1"].why
    with torch.no_grad():
        model.eval()(x)


class OwnDropout(nn.Dropout):
    def forward(self, x):
        return x * (1 - self.p)


def test_identity_keeps_what_is_no_identity_in_evaluation():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(5, alpha=1e-2, k=2.0), OwnDropout(0.3),
        nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3),
    ).eval()  # fmt: skip
    before = model(X)
    model, report = insert(model, X, identity=[X])
    torch.testing.assert_close(model.eval()(X), before, rtol=1e-4, atol=1e-5)
    assert "identity= keeps" in report["2"].why and "a forward of its own" in report["3"].why


class ReadsBias(nn.Module):
    """Forwards that use a convolution's bias elsewhere, or in another way."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = {"scaled": Scaled, "equalized": Equalized, "padded": Padded, "without": Without}.get(
            kind, nn.Conv2d
        )(3, 8, 3)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "functional too":
            return self.head(y.relu()), F.conv2d(x, self.conv.weight, self.conv.bias)
        if self.kind == "read":
            bias: Any = self.conv.bias
            y = y + bias.view(1, -1, 1, 1)
        return self.head(y.relu())


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 3


class Equalized(nn.Conv2d):
    def forward(self, x):
        bias: Any = self.bias
        return F.conv2d(x, self.weight * 0.5, bias * 0.1)


class Padded(nn.Conv2d):
    def forward(self, x):
        return F.pad(super().forward(x), (1, 1, 1, 1))


class Without(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight)


@pytest.mark.parametrize("kind", ["functional too", "read", "scaled", "equalized", "padded", "without"])
def test_a_bias_that_does_anything_else_stays(kind):
    torch.manual_seed(0)
    model = ReadsBias(kind)
    before = model(X)
    model, report = insert(model, X, identity=[X])
    assert inserted(report) == ["conv"] and model.conv.bias is not None
    for mode in (False, True):
        torch.testing.assert_close(model.train(mode)(X), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "batch", "single"),
    [
        (nn.Sequential(nn.Conv1d(3, 7, 3), nn.ReLU(), nn.Conv1d(7, 2, 3)), (4, 3, 9), (3, 9)),
        (nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 2, 3)), (4, 3, 9, 9), (3, 9, 9)),
        (nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2)), (4, 3), (3,)),
    ],
)
def test_an_input_without_a_batch_is_taken_as_before(model, batch, single):
    x, one = torch.randn(batch), torch.randn(single)
    before = model(one)
    model, _ = insert(copy.deepcopy(model), x, identity=[x])
    torch.testing.assert_close(model.eval()(one), before, rtol=1e-4, atol=1e-5)


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        return F.linear(x, self.weight).transpose(1, 2)


class InAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Conv2d(3, 8, 3)]
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(nn.ReLU()(self.layers[0](x)))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight), None


class TakesAPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.head = Pair(), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(torch.relu(self.pair(x)[0]))


@pytest.mark.parametrize(
    ("model", "x", "path"),
    [
        (nn.Sequential(Turned(), nn.Sequential(nn.Conv1d(8, 2, 1))), torch.randn(4, 8, 3), "0"),
        (InAList(), X, ""),
        (TakesAPair(), X, "pair"),
    ],
)
def test_what_has_no_place_for_a_layer_is_left_alone(model, x, path):
    before = model(x)
    model, report = insert(model, x)
    assert inserted(report) == [] and any(row.outcome == "left alone" for row in report.layers)
    torch.testing.assert_close(model(x), before)


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.head(x * self.gate(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))))


@pytest.mark.parametrize(
    "gate",
    [
        torch.sigmoid,
        lambda t: F.relu6(t + 3) / 6,
        lambda t: t.clamp(0, 1),
        lambda t: 1 + torch.tanh(t),
        lambda t: 1 / (1 + torch.exp(-t)),
    ],
)
def test_weights_of_channels_are_left_alone_whatever_makes_them(gate):
    model, report = insert(Gated(gate), X)
    assert inserted(report) == ["conv"]
    assert "attention" in report["up"].why and "attention" in report["down"].why
    model(X)


class AttentionUNet(nn.Module):
    """Its name is no reason; it returns an object."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        found = Result()
        found.mask = torch.sigmoid(self.head(F.relu(self.conv(x)))).clamp(1e-4, 1 - 1e-4)
        return found


class Result:
    mask: torch.Tensor


def test_outputs_in_an_object_are_outputs():
    _, report = insert(AttentionUNet(), X)
    assert inserted(report) == ["conv"] and report["head"].why == "makes an output of the model"


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Tanh())

    def forward(self, number):
        return self.net(torch.randn(number, 4))


def test_a_model_that_begins_with_noise():
    _, report = insert(Generator(), 16)
    assert inserted(report) == ["net.0"]


class ReadsP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.drop, self.head = nn.Linear(16, 16), nn.Dropout(0.1), nn.Linear(16, 4)

    def forward(self, x):
        y = F.relu(self.fc(x))
        return self.head(
            F.scaled_dot_product_attention(y, y, y, dropout_p=self.drop.p if self.training else 0.0)
        )


def test_a_forward_may_read_the_probability_of_a_dropout_that_went():
    model, _ = insert(ReadsP(), torch.randn(4, 5, 16))
    model.train()(torch.randn(4, 5, 16))


def test_parts_that_only_training_calls_are_left_alone_with_identity():
    model = models.googlenet(num_classes=5, init_weights=False).eval()
    _, report = insert(model, torch.randn(2, 3, 64, 64), identity=[torch.randn(2, 3, 64, 64)])
    assert inserted(report) == [] and "not called in evaluation" in report["aux1.fc1"].why


def test_it_works_in_inference_mode_and_with_one_batch():
    model = Functional()
    with torch.inference_mode():
        model, _ = insert(model, X, identity=X)
    model.train()(X).sum().backward()


def test_lazy_layers_are_named():
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match="1 is lazy: run a batch"):
        insert(lazy, X)
    with pytest.raises(ValueError, match="where takes names"):
        insert(Functional(), X, where=5)
    with pytest.raises(ValueError, match="where=Conv3d takes none"):
        insert(Functional(), X, where=nn.Conv3d)


def test_a_nonlinearity_that_is_named_in_full():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    _, report = insert(copy.deepcopy(net), torch.randn(8, 4), where="1")
    assert inserted(report) == ["0"]
    net[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="0 cannot have a layer: it has hooks"):
        insert(net, torch.randn(8, 4), where="1")


def test_one_sample_is_no_identity():
    with pytest.raises(ValueError, match="saw one value per channel in identity="):
        insert(
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
            torch.randn(8, 4),
            identity=torch.randn(1, 4),
        )


def test_identity_by_samples_without_a_batch():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3)).eval()
    images = [X[0], X[1]]
    before = [net(each) for each in images]
    whole = F.conv2d(X[:2], net[0].weight)  # type: ignore[arg-type]
    model, _ = insert(net, X, identity=images)
    for each, expected in zip(images, before, strict=True):
        torch.testing.assert_close(model.eval()(each), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[0].norm.running_mean, whole.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_the_dropout_of_attention_stays_and_is_named():
    x = torch.randn(4, 5, 16)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, report = insert(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), encoder, nn.Linear(16, 2)), x)
    assert inserted(report) == ["0"] and isinstance(model[2].dropout, nn.Dropout)
    assert report["2.dropout"].why == "is part of 2"


MUTATIONS = [
    Mutation(
        "insert: the bias stays in the running mean",
        "passes/insert/inserted.py",
        "    if measured and layer.running_mean is not None:",
        "    if False:",
        "evaluation would be off by the bias",
    ),
    Mutation(
        "insert: γ forgets eps",
        "passes/insert/identity.py",
        "(layer.running_var.double() + layer.eps).sqrt()",
        "layer.running_var.double().sqrt()",
        "outputs would change by eps / 2σ²",
    ),
    Mutation(
        "insert: a module that is called twice has one layer for both",
        "graph/nonlinearity.py",
        "        if number > 1:",
        "        if False:",
        "its running statistics would be those of a mixture",
    ),
    Mutation(
        "insert: features are normalised over each position apart",
        "graph/normalized.py",
        "    if x.dim() == 2:",
        "    if True:",
        "a layer would take positions for channels",
    ),
    Mutation(
        "insert: outputs are normalised",
        "graph/nonlinearity.py",
        "        if linear in self._heads:",
        "        if False:",
        "a classifier's scores would lose their scale",
    ),
]
