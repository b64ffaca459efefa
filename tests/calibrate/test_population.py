"""`population` against exact statistics of all the data, and against what other tools make of it."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.testing import assert_close

import batchnorm as bn
from tests.calibrate.test_adapt import everything, same
from tests.mutations.mutation import Mutation
from tests.passes.compare import unlike

KINDS = pytest.mark.parametrize("kind", [nn.BatchNorm2d, bn.BatchNorm2d], ids=["torch's", "ours"])
SIZES = [8, 8, 8, 3]


def data(sizes=SIZES, drift=0.0):
    return [
        torch.randn(size, 3, 4, 4, dtype=torch.float64) * (1 + number) ** drift + drift * number
        for number, size in enumerate(sizes)
    ]


def network(kind):
    layers = [nn.Conv2d(3, 6, 3), kind(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 5, 1), kind(5)]
    return unlike(nn.Sequential(*layers)).double()


def values(x):
    return x.movedim(1, 0).flatten(1)


def statistics(layer):
    return [layer.get_buffer(name) for name in ("running_mean", "running_var")]


@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_pooled_statistics_are_those_of_all_values_and_the_paper_s_are_means_over_batches(kind, training):
    model = network(kind).train(training)
    batches = data(drift=1.0)
    with torch.no_grad():
        first = [values(model[0](x)) for x in batches]
    for estimator in ("pooled", "paper"):
        report = bn.population(model, iter(batches), estimator=estimator)
        if estimator == "pooled":
            expected = torch.cat(first, 1).mean(1), torch.cat(first, 1).var(1)
        else:
            shares = torch.tensor(SIZES, dtype=torch.float64) / sum(SIZES)
            expected = tuple(
                sum(share * found for share, found in zip(shares, each, strict=True))
                for each in ([x.mean(1) for x in first], [x.var(1) for x in first])
            )
        for one, two in zip(statistics(model[1]), expected, strict=True):
            assert_close(one, two, rtol=1e-12, atol=1e-12)
        assert report["1"].what.startswith("27 samples, standard error ") and report.batches == 4
        assert model[1].num_batches_tracked == 4
    assert all(module.training == training for module in model.modules())


@KINDS
def test_deep_layers_see_normalized_batches_and_no_dropout(kind):
    model = network(kind)
    batches = data()
    bn.population(model, batches, estimator="pooled")
    again = copy.deepcopy(model).train()
    again[3].eval()
    again[1].momentum = 0.0
    with torch.no_grad():
        deep = torch.cat([values(again[:5](x)) for x in batches], 1)
    for one, two in zip(statistics(model[5]), (deep.mean(1), deep.var(1)), strict=True):
        assert_close(one, two, rtol=1e-10, atol=1e-10)


@KINDS
def test_sequential_measures_what_a_layer_will_see(kind):
    model = network(kind)
    batches = data(drift=0.5)
    bn.population(model, batches, estimator="pooled", sequential=True)
    with torch.no_grad():
        deep = torch.cat([values(copy.deepcopy(model).eval()[:5](x)) for x in batches], 1)
    for one, two in zip(statistics(model[5]), (deep.mean(1), deep.var(1)), strict=True):
        assert_close(one, two, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="give a list or a loader, not an iterator"):
        bn.population(model, iter(batches), sequential=True)


def test_a_last_small_batch_weighs_what_it_is():
    """torch's update_bn, fvcore's precise BN: each batch counts the same, and dropout is on in update_bn."""
    x = torch.randn(65, 4, dtype=torch.float64)
    x[64] = 50
    batches = [x[:32], x[32:63], x[63:]]
    ours, theirs = nn.BatchNorm1d(4).double(), nn.BatchNorm1d(4).double()
    bn.population(ours, batches)
    torch.optim.swa_utils.update_bn(batches, theirs)
    assert_close(ours.running_mean, x.mean(0), rtol=1e-12, atol=1e-12)
    assert (theirs.get_buffer("running_mean") - x.mean(0)).min() > 5


def test_batches_of_every_kind():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = bn.BatchNorm1d(4)

        def forward(self, image, scale=1.0):
            return self.bn(image * scale)

    x = torch.randn(12, 4)
    for batches, forward in (
        ([x[:6], x[6:]], None),
        ([(x[:6], 1), [x[6:], 2]], None),
        ([{"image": x[:6], "scale": 1.0}, {"image": x[6:]}], None),
        ([{"x": x[:6]}, {"x": x[6:]}], lambda model, batch: model(batch["x"])),
    ):
        model = Model()
        bn.population(model, batches, forward=forward)
        assert_close(model.bn.running_mean, x.mean(0), rtol=1e-5, atol=1e-6)


def test_what_is_not_measured_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.frozen = (bn.BatchNorm1d(4) for _ in range(3))
            self.without = nn.BatchNorm1d(4, track_running_stats=False)
            bn.freeze(self.frozen)

        def forward(self, x):
            return self.without(self.frozen(self.used(self.used(x))))

    model = Model()
    before = copy.deepcopy(model.state_dict())
    report = bn.population(model, [torch.randn(8, 4) + 3] * 3)
    assert [(layer.name, layer.outcome, layer.why) for layer in report.layers] == [
        ("used", "measured", ""),
        ("unused", "left alone", "was not called"),
        ("frozen", "left alone", "is frozen: frozen=True measures it too"),
        ("without", "left alone", "keeps no running statistics"),
    ]
    assert report["used"].what.startswith("24 samples")  # called twice in each batch
    changed = {
        key.partition(".")[0]
        for key, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[key])
    }
    assert changed == {"used"}
    assert bn.population(model, [torch.randn(8, 4)], frozen=True)["frozen"].outcome == "measured"
    assert isinstance(model.frozen.statistics, bn.Population)


class Stop(KeyboardInterrupt):
    pass


@KINDS
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("error", [Stop, ValueError])
def test_after_an_interruption_the_model_is_as_it_was(kind, sequential, error):
    class Batches:
        passes = 0

        def __iter__(self):
            self.passes += 1
            for number, batch in enumerate(data()):
                if number == 2 and self.passes > 2 * sequential:  # the first layer has its statistics by then
                    raise error
                yield batch

    model = network(kind)
    before = everything(model)
    with pytest.raises(error):
        bn.population(model, Batches(), sequential=sequential)
    same(everything(model), before)


def test_it_stops_when_it_is_exact_enough(capsys):
    model = nn.Sequential(nn.BatchNorm1d(4))
    batches = [torch.randn(50, 4) for _ in range(400)]
    report = bn.population(model, batches, tolerance=0.02, progress=True)
    assert 4 < report.batches < 400 and report.error < 0.02
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith(
        f"population: {report.batches} batches, {50 * report.batches:,} samples, standard error 1.9"
    )
    assert report.summary.endswith("standard error 1.99% or less)") or report.error < 0.0199
    bn.population(model, batches, estimator="pooled")
    error = float((statistics(model[0])[0]).square().mean().sqrt())  # of 20,000 values: 0.007
    assert error < 0.02


def test_the_standard_error_is_that_of_repeated_measurements():
    found, said = [], []
    for _ in range(200):
        layer = bn.BatchNorm1d(1, affine=False).double()
        report = bn.population(layer, [torch.randn(10, 1, dtype=torch.float64) for _ in range(20)])
        found.append(torch.stack(statistics(layer)))
        said.append(report.error)
    spread = torch.stack(found).std(0).max().item()
    assert 0.85 < sum(said) / len(said) / spread < 1.15


def test_what_cannot_be_measured_is_an_error():
    layer = bn.BatchNorm1d(4)
    for batches, says, kind in (
        ([], "there were no samples", ValueError),
        ([torch.randn(1, 4)], "one value per channel|more than 1 value", ValueError),
        ([torch.full((4, 4), torch.inf)], "not finite", RuntimeError),
    ):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(kind, match=says):
            bn.population(layer, batches)
        assert all(torch.equal(values, before[key]) for key, values in layer.state_dict().items())
    with pytest.raises(ValueError, match="estimator must be"):
        bn.population(layer, [torch.randn(4, 4)], estimator="mean")  # type: ignore[arg-type]


def of_ranks(rank, world, folder):
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    batches = data([5, 8, 2, 7, 6], drift=0.5)
    for estimator in ("paper", "pooled"):
        alone, together = nn.BatchNorm2d(3).double(), bn.BatchNorm2d(3).double()
        whole = bn.population(together, batches[rank::world], estimator=estimator)
        for each in range(world):  # by one process; every rank has one in a group of its own
            group = dist.new_group([each])
            if each == rank:
                bn.population(alone, batches, estimator=estimator, group=group)
        for one, two in zip(statistics(alone), statistics(together), strict=True):
            assert_close(one, two, rtol=1e-12, atol=1e-12)
        assert whole[""].what.startswith("28 samples") and together.num_batches_tracked == 5
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_have_the_statistics_of_all(world, tmp_path):
    spawn(of_ranks, (world, tmp_path), world)


def test_after_an_error_the_generator_is_as_it_was():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            x = self.norm(x + torch.randn_like(x))
            if len(x) == 3:
                raise RuntimeError("three")
            return x

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="three"):
        bn.population(Noisy(), [torch.zeros(8, 3), torch.zeros(3, 3)])
    assert torch.equal(torch.get_rng_state(), state)


MUTATIONS = [
    Mutation(
        "each batch counts the same", "passes/estimate.py",
        "        count = float(torch.as_tensor(moments.count).double().mean())", "        count = 2.0",
        "a last small batch would count as much as a full one",
    ),
    Mutation(
        "what was measured stays after an interruption", "passes/estimate.py",
        "        for each in saved:\n            each.restore()\n        raise\n", "        raise\n",
        "some layers would have the new statistics and some the old",
    ),
]  # fmt: skip
