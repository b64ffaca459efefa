"""Merged statistics against those of the union, and what is refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.testing import assert_close

import batchnorm as bn
from tests.mutations.mutation import Mutation

SIZES = [50, 3, 200]


def clients():
    """Data that differs between the clients, and a model of each with exact statistics of its own data."""
    found = []
    for number, size in enumerate(SIZES):
        x = torch.randn(size, 4, 5, dtype=torch.float64) * (number + 1) + 3 * number
        model = nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.Linear(5, 2)).double()
        model[0](x)
        found.append((x, model))
    return found


def of_union(xs):
    values = torch.cat(xs).movedim(1, 0).flatten(1)
    return values.mean(1), values.var(1)


def test_merged_statistics_are_those_of_all_values_together():
    found = clients()
    states = [(model.state_dict(), x.numel() // 4) for x, model in found]
    merged = bn.merge_states(states, parameters="first")
    mean, variance = of_union([x for x, _ in found])
    assert_close(merged["0.running_mean"], mean, rtol=1e-12, atol=1e-12)
    assert_close(merged["0.running_var"], variance, rtol=1e-12, atol=1e-12)
    assert merged["0.num_batches_tracked"] == 3 and merged.keys() == found[0][1].state_dict().keys()
    assert torch.equal(merged["1.weight"], found[0][1].get_parameter("1.weight"))
    average = sum(model.state_dict()["0.running_var"] for _, model in found) / 3
    assert (merged["0.running_var"] - average).abs().min() > 1  # which leaves out what is between them


def test_weights_are_shares_of_a_mixture():
    one = {"running_mean": torch.tensor([0.0, 1.0]), "running_var": torch.tensor([1.0, 2.0])}
    two = {"running_mean": torch.tensor([4.0, 1.0]), "running_var": torch.tensor([1.0, 6.0])}
    merged = bn.merge_states([(one, 0.25), (two, 0.75)])
    assert_close(merged["running_mean"], torch.tensor([3.0, 1.0]))
    assert_close(merged["running_var"], torch.tensor([1 + 0.25 * 9 + 0.75 * 1, 5.0]))


def test_what_is_not_statistics_is_the_same_or_averaged_by_count():
    found = clients()
    states = [(model.state_dict(), count) for (_, model), count in zip(found, (1.0, 1.0, 2.0), strict=True)]
    with pytest.raises(ValueError, match=r'1\.(weight|bias) differs between the states: parameters="mean"'):
        bn.merge_states(states)
    merged = bn.merge_states(states, parameters="mean")
    weights = [model.get_parameter("1.weight") for _, model in found]
    assert_close(merged["1.weight"], (weights[0] + weights[1] + 2 * weights[2]).detach() / 4)
    assert merged["0.num_batches_tracked"].dtype == torch.int64
    half = {"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor([True, False])}
    assert bn.merge_states([(half, 1.0), (half, 3.0)], parameters="mean")["w"].dtype == torch.bfloat16


def test_what_cannot_be_merged_is_named():
    state = nn.BatchNorm1d(3).state_dict()
    other = nn.BatchNorm1d(4).state_dict()
    for states, says in (
        ([], "no states"),
        ([(state, 0)], "must be positive, got 0"),
        ([(state, float("nan"))], "must be positive"),
        (
            [(state, 1), (state, 5)],
            r"statistics of 1 value have no variance \(state number 0\): give its weight, 1\.0",
        ),
        ([(state, 5), ({}, 5)], "different keys: bias"),
        ([(state, 5), (other, 5)], r"has shape \(4,\) in state number 1, not \(3,\)"),
    ):
        with pytest.raises(ValueError, match=says):
            bn.merge_states(states)
    with pytest.raises(ValueError, match="parameters must be"):
        bn.merge_states([(state, 5)], parameters="median")  # type: ignore[arg-type]


def test_a_state_is_split_by_what_is_batch_normalization():
    model = nn.ModuleDict({"a": nn.Conv2d(3, 4, 1), "norm": nn.GroupNorm(2, 4), "b": bn.BatchNorm2d(4)})
    shared, own = bn.split_state(model.state_dict())
    assert set(own) == {
        f"b.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert shared.keys() | own.keys() == model.state_dict().keys() and not shared.keys() & own.keys()
    shared, own = bn.split_state(nn.BatchNorm1d(3).state_dict())
    assert not shared and len(own) == 5


def reduced(rank, world, folder):
    """What a rank does; an assertion that fails ends all of them."""
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = clients()[:world]
    x, model = found[rank]
    own = [each.clone() for each in (model[0].running_mean, model[0].running_var)]
    assert bn.reduce_statistics(model, count=float(x.numel())) == ["0"]
    shares = torch.tensor([float(each.numel()) for each, _ in found], dtype=torch.float64)
    shares /= shares.sum()
    moments = [
        (each.movedim(1, 0).flatten(1).mean(1), each.movedim(1, 0).flatten(1).var(1)) for each, _ in found
    ]
    mean = sum(share * mean for share, (mean, _) in zip(shares, moments, strict=True))
    variance = sum(
        share * (variance + (own_mean - mean) ** 2)
        for share, (own_mean, variance) in zip(shares, moments, strict=True)
    )
    assert_close(model[0].running_mean, mean, rtol=1e-12, atol=1e-12)
    assert_close(model[0].running_var, variance, rtol=1e-12, atol=1e-12)
    assert (model[0].running_mean - own[0]).abs().max() > 0.1
    with pytest.raises(ValueError, match="must be positive"):
        bn.reduce_statistics(model, count=float(rank))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_end_with_the_statistics_of_all(world, tmp_path):
    spawn(reduced, (world, tmp_path), world)


MUTATIONS = [
    Mutation(
        "the variance between the states is left out", "calibrate/states.py",
        "    variance = whole.m2 / (sum(counts) - bessel)",
        "    variance = torch.stack([part.m2 for part in parts]).sum(0) / (sum(counts) - bessel)",
        "the average of the variances is what everybody takes",
    ),
]  # fmt: skip
