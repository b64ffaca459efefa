"""`adapt`: running statistics of other data, mixed with those that the model came with."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.data.digits import Digits
from tests.mutations.mutation import Mutation
from tests.passes.compare import unlike

SIZES = [5, 1, 9, 3]  # a batch of one sample among them: it has positions
EITHER = pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d], ids=["torch's", "ours"])


def target(sizes=SIZES, shape=(3, 4)):
    """Batches whose mean and spread wander."""
    return [(1 + k) * torch.randn(n, *shape) + 10 * k - 5 for k, n in enumerate(sizes)]


def moments(xs):
    """Mean and unbiased variance of all values of each channel together, in float64."""
    values = torch.cat([x.double().movedim(1, 0).flatten(1) for x in xs], 1)
    var, mean = torch.var_mean(values, 1)
    return mean, var


def statistics(layer):
    return [layer.get_buffer(name) for name in ("running_mean", "running_var")]


def near(layer, expected, rtol=1e-6):
    assert_close(statistics(layer), [each.float() for each in expected], rtol=rtol, atol=1e-6)


def everything(model):
    """Whatever adapting may leave behind."""
    modes = {name: each.training for name, each in model.named_modules()}
    hooks = {
        name: len(each._forward_pre_hooks) + len(each._forward_hooks) for name, each in model.named_modules()
    }
    settings = {
        name: {
            key: vars(each).get(key) for key in ("track_running_stats", "statistics", "momentum", "forward")
        }
        for name, each in model.named_modules()
    }
    return modes, hooks, settings, dict(copy.deepcopy(model.state_dict()))


def same(found, expected):
    assert found[:3] == expected[:3]
    assert_close(found[3], expected[3], rtol=0, atol=0)


def small(kind=bn.BatchNorm1d, **options):
    return unlike(nn.Sequential(kind(3, **options), nn.ReLU(), nn.Conv1d(3, 3, 1), kind(3, **options))).eval()


@EITHER
def test_adabn_gives_the_moments_of_all_batches_together(kind):
    model, xs = small(kind), target()
    found = bn.adapt(model, xs)
    near(model[0], moments(xs))
    assert found.samples == sum(SIZES)
    assert repr(found) == "2 layers adapted to 18 samples"
    assert {type(model[0]), type(model[3])} == {kind}


@EITHER
def test_a_deep_layer_sees_what_comes_from_batches_that_were_normalised_by_themselves(kind):
    model, xs = small(kind), target([6, 4])
    oracle = copy.deepcopy(model).train().double()
    bn.adapt(model, xs)
    near(model[3], moments([oracle[:3](x.double()).detach() for x in xs]), rtol=1e-5)


@EITHER
@pytest.mark.parametrize("prior", [1, 16, 1e-3, 2.5])
def test_a_prior_counts_for_so_many_samples(kind, prior):
    model, xs = small(kind), target()
    old = [each.double() for each in statistics(model[0])]
    bn.adapt(model, xs, prior)
    n = sum(SIZES)
    expected = [prior / (prior + n) * a + n / (prior + n) * b for a, b in zip(old, moments(xs), strict=True)]
    near(model[0], expected)


@EITHER
def test_an_infinite_prior_moves_nothing(kind):
    model = small(kind)
    before = everything(model)
    bn.adapt(model, target(), math.inf)
    same(everything(model), before)


@EITHER
def test_reset_gives_everything_back(kind):
    model = small(kind)
    before = everything(model)
    adaptation = bn.adapt(model, target())
    assert not torch.equal(model[0].get_buffer("running_mean"), before[3]["0.running_mean"])
    adaptation.reset()
    same(everything(model), before)


@EITHER
def test_a_block_gives_everything_back_also_when_it_fails(kind):
    model, xs = small(kind), target()
    before = everything(model)
    with bn.adapt(model, xs) as adaptation:
        assert adaptation.samples == 18
        near(model[0], moments(xs))
    same(everything(model), before)
    with pytest.raises(ZeroDivisionError), bn.adapt(model, xs):
        raise ZeroDivisionError
    same(everything(model), before)


def test_adapting_again_begins_with_what_there_is():
    model, xs = small(), target([4, 4])
    first = bn.adapt(model, xs[:1])
    second = bn.adapt(model, xs[1:], prior=4)
    near(model[0], [(a + b) / 2 for a, b in zip(moments(xs[:1]), moments(xs[1:]), strict=True)])
    second.reset()
    near(model[0], moments(xs[:1]))
    first.reset()


@EITHER
@pytest.mark.parametrize("training", [True, False])
def test_modes_and_counts_are_as_before(kind, training):
    inner = small(kind)
    model = nn.Sequential(inner, nn.Dropout()).train(training)
    inner[3].train(not training)
    before = everything(model)
    buffers = {name: id(each) for name, each in model.named_buffers()}
    bn.adapt(model, target())
    assert everything(model)[:3] == before[:3]
    assert {name: id(each) for name, each in model.named_buffers()} == buffers
    assert inner[0].num_batches_tracked == before[3]["0.0.num_batches_tracked"]


def test_everything_else_is_in_evaluation():
    model = nn.Sequential(nn.Dropout(0.5), bn.BatchNorm1d(3)).train()
    xs = target()
    state = torch.get_rng_state()
    bn.adapt(model, xs)
    near(model[1], moments(xs))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_graph_is_kept():
    model = small()
    bn.adapt(model, [x.requires_grad_() for x in target()])
    assert not any(each.requires_grad for each in model.buffers())


class Failing(Exception):
    pass


class Stream:
    """Batches of which the last ones are not to be had."""

    def __iter__(self):
        yield from target()
        raise Failing


def wrong_size():
    return [*target(), torch.randn(4, 2, 4)]


def domains_of(model):
    """Where it can be adapted: torch's layers have no domains."""
    return (None, "target") if isinstance(model[0], bn.BatchNorm1d) else (None,)


def test_torch_s_layers_have_no_domain_to_adapt():
    model = small(nn.BatchNorm1d)
    before = everything(model)
    with bn.domain("target"), pytest.raises(ValueError, match=r"no domains.*bn\.upgrade"):
        bn.adapt(model, target())
    same(everything(model), before)


@EITHER
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("batches", "error"),
    [(Stream, Failing), (wrong_size, RuntimeError), (list, ValueError)],
    ids=["stream", "size", "none"],
)
def test_an_error_leaves_everything_as_it_was(kind, training, batches, error):
    model = small(kind).train(training)
    before = everything(model)
    for place in domains_of(model):
        with bn.domain(place), pytest.raises(error):
            bn.adapt(model, batches())
        same(everything(model), before)
    model.train()(torch.randn(4, 3, 4))  # and it still tracks
    assert not torch.equal(model[0].get_buffer("running_mean"), before[3]["0.running_mean"])


@EITHER
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_layer_that_sees_no_numbers_is_named(kind, bad):
    model = small(kind)
    before = everything(model)
    xs = target()
    xs[1][0, 1, 2] = bad
    for place in domains_of(model):
        with bn.domain(place), pytest.raises(RuntimeError, match=r"layer '0'.*inf or nan"):
            bn.adapt(model, xs)
        same(everything(model), before)


def test_a_later_layer_that_sees_no_numbers_is_named_and_the_first_is_unchanged():
    model = small()
    with torch.no_grad():
        model[2].bias[0] = torch.nan
    before = everything(model)
    with pytest.raises(RuntimeError, match="layer '3'"):
        bn.adapt(model, target())
    assert_close(everything(model)[3], before[3], rtol=0, atol=0, equal_nan=True)


def test_a_variance_beyond_the_buffers_is_refused():
    layer = bn.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match="not finite"):
        bn.adapt(layer, [torch.full((4, 3), 1e20), torch.full((4, 3), -1e20)])
    assert_close(statistics(layer), statistics(nn.BatchNorm1d(3)), rtol=0, atol=0)


@EITHER
def test_one_value_per_channel_is_an_error(kind):
    model = small(kind)
    before = everything(model)
    with pytest.raises(ValueError, match="more than 1 value"):
        bn.adapt(model, [torch.randn(1, 3, 1)])
    same(everything(model), before)


@pytest.mark.parametrize("prior", [-1, -1e-9, math.nan, -math.inf])
def test_a_negative_prior_is_an_error(prior):
    with pytest.raises(ValueError, match="prior"):
        bn.adapt(small(), target(), prior)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)],
    ids=["no layer", "no statistics"],
)
def test_a_model_without_statistics_is_an_error(model):
    with pytest.raises(ValueError, match="no samples"):
        bn.adapt(model, [torch.randn(4, 3)])


def test_empty_batches_say_nothing():
    model, xs = small(), target([5, 4])
    bn.adapt(model, [xs[0], torch.empty(0, 3, 4), xs[1]])
    near(model[0], moments(xs))
    with pytest.raises(ValueError, match="no samples"):
        bn.adapt(model, [torch.empty(0, 3, 4)])


class Two(nn.Module):
    """Of two arguments, one of them by name; and a layer that is never called."""

    def __init__(self, kind=bn.BatchNorm1d):
        super().__init__()
        self.norm, self.idle = kind(3), unlike(kind(3))

    def forward(self, x, shift=None):
        return self.norm(x if shift is None else x + shift)


@EITHER
@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict", "forward"])
def test_batches_of_every_form(kind, form):
    model, xs = Two(kind), target()
    before = everything(model)
    given = {
        "tensor": xs,
        "tuple": [(x, "a label") for x in xs],
        "list": [[x] for x in xs],
        "dict": [{"shift": torch.ones(4), "x": x - 1} for x in xs],
        "forward": [("a label", x) for x in xs],
    }[form]
    forward = (lambda network, batch: network(batch[1])) if form == "forward" else None
    bn.adapt(model, iter(given), forward=forward)
    near(model.norm, moments(xs))
    assert_close(
        statistics(model.idle),
        [before[3][f"idle.running_{name}"] for name in ("mean", "var")],
        rtol=0,
        atol=0,
    )


def test_a_hook_of_the_users_comes_first():
    model, xs = bn.BatchNorm1d(3), target()
    model.register_forward_pre_hook(lambda _, arguments: (2 * arguments[0],))
    bn.adapt(model, xs)
    near(model, moments([2 * x for x in xs]))


def test_a_domain_takes_the_result_and_the_source_stays():
    model, xs = small(), target()
    before = copy.deepcopy(model.state_dict())
    with bn.domain("target"):
        adaptation = bn.adapt(model, xs, prior=6)
        inside = model(xs[0])
    after = model.state_dict()
    assert_close({name: after[name] for name in before}, before, rtol=0, atol=0)
    mixed = [(6 * a + 18 * b.float()) / 24 for a, b in zip(statistics(model[0]), moments(xs), strict=True)]
    near(model[0].domains["target"], mixed)
    assert not any(each.training for each in model.modules())
    plain = small()
    plain.load_state_dict(before)
    bn.adapt(plain, xs, prior=6)
    assert_close(inside, plain(xs[0]))
    adaptation.reset()
    assert not model[0].has_domain("target")


def test_masked_positions_are_not_counted():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bn.BatchNorm1d(3)

        def forward(self, x, lengths):
            return self.norm(x, mask=lengths)

    xs, lengths = target([5, 4]), [torch.tensor([4, 1, 0, 2, 3]), torch.tensor([2, 2, 1, 4])]
    model = Masked()
    valid = [torch.arange(4) < each[:, None] for each in lengths]
    rows = [x.movedim(1, -1)[where] for x, where in zip(xs, valid, strict=True)]
    for x, where in zip(xs, valid, strict=True):
        x.masked_fill_(~where[:, None], torch.nan)
    found = bn.adapt(model, [{"x": x, "lengths": each} for x, each in zip(xs, lengths, strict=True)])
    near(model.norm, moments(rows))
    assert found.samples == 9
    bn.adapt(model, list(zip(xs, lengths, strict=True)), forward=lambda network, batch: network(*batch))
    near(model.norm, moments(rows))


def test_every_activation_of_its_own():
    layer, xs = bn.BatchNorm1d((3, 4)), target([5, 4])
    before = copy.deepcopy(layer.state_dict())
    adaptation = bn.adapt(layer, xs)
    near(layer, [each.reshape(3, 4) for each in moments([x.flatten(1) for x in xs])])
    adaptation.reset()
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "own", [bn.Population(), bn.Ghost(2), bn.Renorm(), bn.Population(bn.Ghost(2)), bn.Sync()], ids=repr
)
def test_whatever_moments_a_layer_takes_it_is_adapted_and_keeps_them(own):
    model, xs = small(statistics=own), target()
    plain = small()
    plain.load_state_dict(model.state_dict())
    bn.adapt(model, xs)
    bn.adapt(plain, xs)
    assert_close(model.state_dict(), plain.state_dict())
    assert model[0].statistics is own
    assert type(model[0]) is bn.BatchNorm1d


def test_a_frozen_model_stays_frozen():
    model, xs = bn.freeze(small(nn.BatchNorm1d))[0].train(), target()
    bn.adapt(model, xs)
    near(model[0], moments(xs))
    model(xs[0])
    near(model[0], moments(xs))


def test_torchs_synchronised_layer_is_adapted():
    model, xs = small(nn.SyncBatchNorm), target()
    bn.adapt(model, xs)
    near(model[0], moments(xs))


def test_layers_of_half_width():
    model, xs = small().bfloat16(), [x.bfloat16() for x in target()]
    bn.adapt(model, xs)
    near(model[0], moments(xs))


def test_an_upgraded_model_is_adapted_as_before():
    model, xs = small(nn.BatchNorm1d), target()
    ours, _ = bn.upgrade(copy.deepcopy(model))
    for each in (model, ours):
        bn.adapt(each, xs, prior=4)
    assert_close(ours.state_dict(), model.state_dict())


@pytest.fixture(scope="module")
def trained():
    """A small network that knows digits, and how to ask how many."""
    torch.manual_seed(0)
    digits = Digits.load()
    images, labels = digits.train_images[:4000, None, ::2, ::2] / 255, digits.train_labels[:4000].long()
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for step in range(120):
        rows = slice(100 * step % 4000, 100 * step % 4000 + 100)
        optimiser.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimiser.step()
    return network.eval(), digits.test_images[:1000, None, ::2, ::2] / 255, digits.test_labels[:1000]


def accuracy(network, images, labels):
    with torch.no_grad():
        return float((network(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize(("contrast", "light"), [(0.25, 0.6), (4.0, -3.0)], ids=["faint", "glaring"])
def test_digits_in_another_light_are_recognised_again(trained, contrast, light):
    network, images, labels = trained
    clean = accuracy(network, images, labels)
    shifted = contrast * images + light
    lost = accuracy(network, shifted, labels)
    assert clean > 0.9 and lost < 0.6
    with bn.adapt(network, shifted.split(200)):
        assert accuracy(network, shifted, labels) > clean - 0.05
    with bn.adapt(network, [shifted[:32]], prior=8):  # few samples help as well
        assert accuracy(network, shifted, labels) > lost + 0.15
    assert accuracy(network, images, labels) == clean


def test_a_layer_that_is_called_twice_counts_a_sample_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x) + self.norm(x + 1)

    model, xs = Twice(), [torch.randn(4, 3), torch.randn(6, 3)]
    adapted = bn.adapt(model, xs, prior=10)
    assert adapted.samples == 10
    mean, _ = moments([x for each in xs for x in (each, each + 1)])
    assert_close(model.norm.get_buffer("running_mean").double(), mean / 2, rtol=1e-6, atol=1e-6)


def test_a_domain_that_began_with_it_is_gone_after_a_reset():
    model = small()
    before = everything(model)
    with bn.domain("target"):
        with bn.adapt(model, target()):
            model.eval()(target()[0])
        with pytest.raises(RuntimeError, match="domain 'target'"):
            model.eval()(target()[0])
    same(everything(model.eval()), before)


def test_a_reset_finds_the_buffers_of_a_converted_model():
    model = small()
    before = [values.clone() for values in statistics(model[0])]
    adapted = bn.adapt(model, target())
    model.double()
    adapted.reset()
    assert_close([values.float() for values in statistics(model[0])], before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"momentum": None}, {"debiased": True}], ids=str)
def test_training_goes_on_from_adapted_statistics_of_a_new_domain(options):
    layer = bn.BatchNorm1d(3, **options)
    with bn.domain("target"):
        bn.adapt(layer, [100 + torch.randn(8, 3), 100 + torch.randn(8, 3)])
        layer.train()(torch.randn(8, 3))
    target_s = layer.domains.get_submodule("target")
    assert (target_s.get_buffer("running_mean") > 30).all()
    assert target_s.get_buffer("num_batches_tracked") == 3


def test_adapting_under_inference_mode_leaves_a_layer_that_trains():
    model = nn.Sequential(bn.BatchNorm1d(3))
    with torch.inference_mode(), bn.domain("target"):
        bn.adapt(model, [torch.randn(8, 3)])
    model.load_state_dict(model.state_dict())
    with bn.domain("target"):
        model.train()(torch.randn(8, 3)).sum().backward()


def test_an_activation_in_a_layer_stays_in_evaluation():
    activation = nn.RReLU(0, 1)
    seen = []
    activation.register_forward_hook(lambda module, *_: seen.append(module.training))
    bn.adapt(nn.Sequential(bn.BatchNorm1d(3, activation=activation)).train(), [torch.randn(8, 3)])
    assert seen == [False]
    assert activation.training


MUTATIONS = [
    Mutation(
        "a reset that keeps the domain", "calibrate/collecting.py",
        "if self.is_new and isinstance(self._layer, _BatchNorm) and self._domain is not None:", "if False:",
        "it says 0 and 1 from then on",
    ),
    Mutation(
        "left in training", "calibrate/batches.py",
        "            module.training = mode\n", "            pass\n",
        "the next evaluation is by the batch",
    ),
]  # fmt: skip


def test_empty_inputs_say_so():
    layer = bn.BatchNorm2d(3)
    for empty in (torch.zeros(4, 3, 0, 5), torch.zeros(0, 3, 2, 2)):
        with pytest.raises((ValueError, RuntimeError), match=r"saw no values|no samples|nothing"):
            bn.adapt(layer, [empty])
