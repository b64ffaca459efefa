"""Sync: many processes, one batch. What ranks do together is in ranks.py; here they are launched."""

import copy
import os
import pickle
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn
from batchnorm.statistics.process_group import _Collective
from tests.forked import Forked
from tests.mutations.mutation import Mutation
from tests.statistics import ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


def started(folder: Path, count: int, tasks: list[str], **env: str) -> list[Forked]:
    """So many ranks at work on tasks; a file to meet in, for it does not die with a rank."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return [
        Forked(ranks.main, rank, count, str(folder / "store"), tasks, out=folder / f"rank-{rank}", env=env)
        for rank in range(count)
    ]


def failures(folder: Path, count: int) -> dict[str, str]:
    """Why tasks of so many ranks fail; all in one launch, but for a new one after each of the first that fail."""
    found: dict[str, str] = {}
    left = list(ranks.TASKS[count])
    for launch in range(3):
        (folder / f"{launch}").mkdir()
        processes = started(folder / f"{launch}", count, left)
        until = time.monotonic() + 200
        while time.monotonic() < until and any(each.running for each in processes):
            if any(each.join(0.02) for each in processes):  # the others would wait for one that has failed
                break
        for each in processes:
            if each.running and each.join(1) is None:
                os.killpg(each.pid, signal.SIGKILL)
        done = [name for name in left if f"{name}: done" in processes[0].out]
        left = left[len(done) :]
        if not left:
            return found
        found[left.pop(0)] = "\n".join(f"{each.join()}: {each.out}{each.err}" for each in processes)
    return found | dict.fromkeys(left, "not reached, for others failed")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> dict[str, str]:
    return failures(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory) -> dict[str, str]:
    return failures(tmp_path_factory.mktemp("four"), 4)


@pytest.mark.xdist_group("two ranks")
@pytest.mark.parametrize("task", ranks.TASKS[2])
def test_two_ranks(task, of_two):
    assert task not in of_two, of_two[task]


@pytest.mark.slow
@pytest.mark.xdist_group("four ranks")
@pytest.mark.parametrize("task", ranks.TASKS[4])
def test_four_ranks(task, of_four):
    assert task not in of_four, of_four[task]


@pytest.mark.parametrize(
    "numbers", [(2, 2, 2, 2), (1, 2, 3, 2), (1, 3, 1, 3), (2, 2, 2, 3), (2**20 - 1,) * 8192]
)
@pytest.mark.parametrize("name", ["all_gather", "all_reduce"])
def test_ranks_agree_if_all_bring_the_same_number(name, numbers):
    collective = _Collective(name, 4, torch.float64)
    brought = torch.tensor(
        [[*collective.head(number), 5, 6, 7][:4] for number in numbers], dtype=torch.float64
    )
    found = brought if name == "all_gather" else brought.sum(0)
    for number in set(numbers):
        assert collective.agreed(found, number, len(numbers)) == (len(set(numbers)) == 1)


def survivors(task: str, tmp_path: Path, **env: str) -> list[str]:
    """What the first and the last of three ranks say, which end by themselves, and with an error."""
    processes = started(tmp_path, 3, [task], **env)
    try:
        statuses = [processes[rank].join(45) for rank in (0, 2)]
    finally:
        for each in processes:
            if each.running:
                os.killpg(each.pid, signal.SIGKILL)
    said = [processes[rank].out + processes[rank].err for rank in (0, 2)]
    assert statuses == [1, 1], said
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "where", "kernels"),
    [
        ("dies", "forward", "native"),
        ("dies", "backward", "native"),
        ("dies", "backward", "reference"),
        ("hangs", "forward", "native"),
        ("hangs", "backward", "native"),
    ],
)
def test_a_rank_that_does_not_come_is_an_error_that_names_the_layer(way, where, kernels, tmp_path):
    for said in survivors(f"a_rank_{way}_{where}", tmp_path, BATCHNORM_KERNELS=kernels):
        assert re.search(r"RuntimeError: layer 'body.1': BatchNorm1d\(.*rank [02] could not exchange", said)
        assert ("forward is done" in said) == (where == "backward"), said


def test_without_a_process_group_it_costs_nothing():
    ranks.costs_nothing(bn.Sync())


def test_nobody_else_has_to_be_there_for_a_pickle():
    layer = pickle.loads(pickle.dumps(bn.BatchNorm2d(3, statistics=bn.Sync())))
    assert layer.statistics == bn.Sync()
    layer(torch.randn(2, 3, 4, 4))
    assert copy.deepcopy(layer).statistics == bn.Sync()
    assert "statistics=Sync(process_group=None)" in repr(layer)
    assert layer.state_dict().keys() == nn.BatchNorm2d(3).state_dict().keys()


class Group:
    """Stands for a process group, of which conversion has to know nothing."""


def each_kind() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm1d(3, eps=1e-3),
        nn.BatchNorm2d(3, momentum=None),
        nn.BatchNorm3d(3, affine=False),
        nn.SyncBatchNorm(3, process_group=Group()),
        bn.BatchNorm2d(3, activation="relu", on_single="running"),
        bn.BatchNorm1d((3, 2), debiased=True),
    )


def groups(model: nn.Sequential) -> list[Any]:
    return [vars(layer)["statistics"].process_group for layer in model]


def test_every_kind_becomes_sync_in_place():
    model = each_kind()
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append("hook"))
    layers, parameters = list(model), [id(each) for each in model.parameters()]
    before = {name: values.clone() for name, values in model.state_dict().items()}
    group = vars(model[3])["process_group"]
    assert bn.convert_sync(model)[0] is model
    kinds = [bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d, bn.BatchNorm, bn.BatchNorm2d, bn.BatchNorm1d]
    assert [type(layer) for layer in model] == kinds
    assert all(a is b for a, b in zip(model, layers, strict=True))
    assert [id(each) for each in model.parameters()] == parameters
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert groups(model) == [None, None, None, group, None, None]
    assert model[0].eps == 1e-3 and vars(model[1])["momentum"] is None and model[4].activation == "relu"
    assert model[4].on_single == "running" and model[5].debiased
    model[1](torch.randn(2, 3, 4, 4))
    assert seen == ["hook"]
    for shape in ((4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2)):
        torch.testing.assert_close(model[3](torch.ones(shape)), torch.zeros(shape))


def test_a_group_stays_unless_another_is_given():
    model, other = each_kind(), Group()
    group = vars(model[3])["process_group"]
    for change in (bn.convert_sync, bn.freeze, bn.convert_sync, bn.unfreeze, bn.convert_sync):
        change(model)
    assert groups(model) == [None, None, None, group, None, None]
    bn.convert_sync(model, other)
    assert all(layer.statistics == bn.Sync(other) for layer in model)


def test_frozen_layers_stay_frozen():
    model = bn.freeze(nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3)), affine=True)[0]
    bn.convert_sync(model)
    assert all(layer.statistics == bn.Population(bn.Sync()) for layer in model)
    assert not any(values.requires_grad for values in model.parameters())
    x = torch.randn(4, 3) + 5
    torch.testing.assert_close(model.train()(x), x, rtol=1e-4, atol=1e-4)
    assert all(layer.num_batches_tracked == 0 for layer in model)
    bn.unfreeze(model)
    assert all(layer.statistics == bn.Sync() for layer in model)
    torch.testing.assert_close(model(x).mean(0), torch.zeros(3), rtol=0, atol=1e-6)


def test_an_upgraded_resnet():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=4)
    x = torch.randn(2, 3, 64, 64)
    upgraded, _ = bn.upgrade(copy.deepcopy(model))
    before = upgraded.state_dict().keys()
    bn.convert_sync(upgraded)
    layers = [each for each in upgraded.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    assert len(layers) == 20 and all(layer.statistics == bn.Sync() for layer in layers)
    assert any(layer.activation == "relu" for layer in layers)
    assert upgraded.state_dict().keys() == before
    torch.testing.assert_close(upgraded(x), model(x), rtol=1e-3, atol=1e-3)


class Odd(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (lambda: bn.BatchNorm2d(3, statistics=bn.Ghost(4)), "'2' has statistics=Ghost"),
        (lambda: bn.freeze(bn.BatchNorm2d(3, statistics=bn.Ghost(4)))[0], "'2' has statistics=Ghost"),
        (lambda: bn.BatchNorm2d(3, statistics=bn.Renorm()), "'2' has statistics=Renorm"),
        (lambda: Odd(3), "2 is Odd of "),
        (lambda: nn.LazyBatchNorm2d(), "2 is lazy"),
    ],
    ids=["ghost", "frozen ghost", "renorm", "subclass", "lazy"],
)
def test_what_cannot_become_sync_is_named_and_nothing_changes(last, why):
    model = nn.Sequential(nn.BatchNorm2d(3), bn.BatchNorm2d(3), last())
    before, kinds = repr(model), [type(layer) for layer in model]
    with pytest.raises(ValueError, match=why):
        bn.convert_sync(model)
    assert repr(model) == before
    assert [type(layer) for layer in model] == kinds


MUTATIONS = [
    Mutation(
        "a frozen layer thawed by synchronising", "passes/convert_sync.py",
        "Population(sync) if isinstance(layer.statistics, Population) else sync", "sync",
        "it stays frozen until unfreeze",
    ),
    Mutation(
        "SyncBatchNorm's own group lost", "passes/convert_sync.py",
        "groups = [process_group or _group(layer) for", "groups = [process_group for",
        "statistics of ranks that the model's author kept apart",
    ),
]  # fmt: skip
