"""The arithmetic of traffic.py against what real processes exchange."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn
from batchnorm.bench import traffic
from batchnorm.bench.ranks import Ranks
from batchnorm.bench.traffic import Collective
from tests.bench import observer
from tests.forked import quick_starts

pytest.importorskip("torchvision", reason="ResNet is torchvision's")
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


def counted(*collectives):
    return Counter(f"{each.name} {each.bytes}" for some in collectives for each in some)


together = pytest.mark.xdist_group("what three ranks exchange")


@pytest.fixture(scope="module")
def seen():
    with quick_starts(), Ranks(3, observer.candidates, turns=1) as ranks:
        names = [f"{name} {what}" for name in observer.MODELS for what in ("without", "with", "population")]
        yield {name: ranks(name) for name in [*names, "inception alone"]}


@pytest.mark.slow
@together
@pytest.mark.parametrize("name", observer.MODELS)
def test_a_step_exchanges_what_arithmetic_says(name, seen):
    plain = observer.MODELS[name]()
    assert seen[f"{name} without"] == counted(traffic.gradients(plain), traffic.buffers(plain))
    ours = bn.convert_sync(observer.MODELS[name]())[0]
    assert seen[f"{name} with"] == counted(
        traffic.gradients(ours), traffic.buffers(ours), traffic.exchanges(ours)
    )
    assert seen[f"{name} population"] == counted(traffic.population(plain))


@pytest.mark.slow
@together
def test_in_a_group_of_one_sync_adds_nothing(seen):
    assert seen["inception alone"] == seen["inception without"]


@pytest.mark.parametrize(
    ("name", "received_bytes"),
    [("all_gather", [0, 10, 70]), ("all_reduce", [0, 10, 17.5]), ("broadcast", [0, 10, 10])],
)
def test_what_reaches_a_rank_of_one_two_and_eight(name, received_bytes):
    assert [Collective(name, 10).received_bytes(ranks) for ranks in (1, 2, 8)] == received_bytes
    assert traffic.received_bytes([Collective(name, 10)] * 3, 8) == 3 * received_bytes[-1]


def test_single_activations_have_moments_of_their_own():
    model = nn.Sequential(bn.BatchNorm2d((3, 4, 5)), bn.BatchNorm2d(2))
    assert traffic.exchanges(model) == [
        ("all_gather", 8 * 122),
        ("all_gather", 8 * 6),
        ("all_reduce", 8 * 6),
        ("all_reduce", 8 * 122),
    ]
    assert traffic.population(model) == [("all_gather", 8 * (2 * 3 + 6 * 62))]


def test_buckets_are_closed_by_what_fills_them():
    mib = 2**18  # float32 in a MiB
    with torch.device("meta"):
        model = nn.ParameterList(nn.Parameter(torch.empty(count * mib)) for count in (1, 24, 10, 20, 3, 1))
        assert [each.bytes / 2**20 for each in traffic.gradients(model)] == [1, 33, 25]
        model[3].requires_grad_(False)
        model[2] = nn.Parameter(torch.empty(2 * mib, dtype=torch.bfloat16))
        assert sorted(each.bytes / 2**20 for each in traffic.gradients(model)) == [1, 1, 1, 27]
