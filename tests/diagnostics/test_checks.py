"""Each bug, planted in networks of three kinds, is found at its layer and nothing else is; a fix removes it."""

import copy

import pytest
import torch

import batchnorm as bn
from batchnorm.diagnostics.check import checks
from batchnorm.diagnostics.examine import examine
from tests.diagnostics.networks import NETWORKS, case, healthy

CHECKS = checks()
SEVERAL_PROCESSES = {"BN501", "BN502"}
WATCHED = {each.code for each in CHECKS if "steps" in each.needs}
ALONE = [each for each in CHECKS if each.code not in SEVERAL_PROCESSES and not each.on_request]


NAMES = """
    BN101 redundant-bias, BN102 dropout-before, BN103 strong-dropout, BN104 response-normalization,
    BN105 after-nonlinearity, BN106 normalized-twice, BN107 nothing-linear-before, BN108 shared-layer,
    BN201 momentum, BN202 statistics-values, BN203 statistics-dtype, BN204 mixed-modes, BN205 drifting,
    BN206 never-updated, BN207 reset, BN208 below-eps, BN209 dead-channels, BN210 exploding-channels,
    BN211 eps-differs, BN212 batch-counter, BN213 folded-twice, BN214 few-steps, BN215 averaged-weights,
    BN301 optimizer-misses, BN302 weight-decay, BN303 updated-twice, BN304 counts-differ,
    BN305 evaluation-while-training, BN306 moved-without-gradient, BN307 two-domains, BN308 small-micro-batches,
    BN401 single-value, BN402 small-batch, BN403 ordered-batches, BN404 repeated-batches, BN405 stale-statistics,
    BN406 constant-channels, BN407 dead-activations, BN408 nonfinite-input, BN409 padding, BN410 leaking-examples,
    BN501 ranks-differ, BN502 local-batch, BN503 sync-alone, BN504 sync-skipped,
    BN601 export-in-training, BN602 private, BN603 federated, BN604 checkpoint-keys, BN605 eps-changed,
    BN701 upgrade-speed, BN702 spared-memory
"""


def serious(findings):
    return [(each.code, each.layer) for each in findings if each.severity != "info"]


def of_case(planted, **options):
    given = dict(planted.options)
    passes, between = given.pop("passes", None), given.pop("between", None)
    if passes is None and between is None and planted.code not in WATCHED:
        return examine(planted.model, planted.batches, planted.optimizer, **given, **options)
    for group in planted.optimizer.param_groups:
        group["lr"] = 1e-4
    with bn.watch(planted.model, planted.optimizer, **given, **options) as doctor:
        for batch in planted.batches:
            planted.optimizer.zero_grad()
            for part in batch.chunk(passes or 1):
                planted.model(part).square().mean().backward()
            planted.optimizer.step()
            if between is not None:
                between(planted.model, batch)
    return doctor.findings


@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_is_found_in_a_healthy_network(network):
    model, batches, optimizer = healthy(NETWORKS[network][0])
    before = copy.deepcopy(model.state_dict())
    for found in (examine(model, batches, optimizer), examine(model.eval(), batches), examine(model.train())):
        assert serious(found) == []
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("check", ALONE, ids=lambda check: f"{check.code}-{check.name}")
@pytest.mark.parametrize("network", NETWORKS)
def test_a_planted_bug_is_found_at_its_layer_and_nothing_else(network, check):
    planted = case(network)
    planted.code = check.code
    check.plant(planted)
    found = of_case(planted)
    here = [each for each in found if each.code == check.code]
    assert [each.layer for each in here] == [planted.path]
    assert serious(found) == ([(check.code, planted.path)] if here[0].severity != "info" else [])
    assert here[0].message and here[0].fix
    assert check.code not in {each.code for each in of_case(planted, ignore=[check.code])}
    assert {each.code for each in of_case(planted, select=[check.code])} == {check.code}
    if check.fixes:
        mended = of_case(planted, fix=True)
        assert [each.finding.layer for each in mended.fixed] == [planted.path] and mended.fixed[0].change
        assert serious(mended) == [] and check.code not in {each.code for each in mended}
        planted.model.train()(planted.batches[0])


def test_codes_are_stable_and_each_says_why():
    assert [f"{each.code} {each.name}" for each in CHECKS] == [
        " ".join(each.split()) for each in NAMES.split(",")
    ]
    for each in CHECKS:
        assert each.symptom and each.why and each.source and each.severity in ("error", "warning", "info")
        known = {other.code for other in CHECKS} - {each.code}
        assert known.issuperset(each.yields_to) and known.issuperset(each.follows)


@pytest.mark.slow
def test_the_time_that_an_upgrade_saves_is_measured_where_it_is_asked_for():
    planted = case("torchvision")
    assert "BN701" not in {each.code for each in examine(planted.model, planted.batches)}
    before = copy.deepcopy(planted.model.state_dict())
    found = examine(planted.model, planted.batches, select=["BN701"])
    assert "BN701" not in found.skipped
    for each in found:
        assert float(each.evidence["upgraded"]) < float(each.evidence["milliseconds"])
    assert all(torch.equal(before[key], value) for key, value in planted.model.state_dict().items())
    assert not examine(bn.upgrade(planted.model)[0], planted.batches, select=["BN701"])


@pytest.mark.parametrize("network", NETWORKS)
def test_the_memory_that_is_spared_is_measured_where_it_is_asked_for(network):
    planted = case(network)
    assert "BN702" not in {each.code for each in examine(planted.model, planted.batches)}
    (found,) = examine(planted.model, planted.batches, select=["BN702"])
    assert float(found.evidence["spared"]) < 0.9 * float(found.evidence["megabytes"])
    assert not planted.model._forward_pre_hooks
    model, _ = bn.save_memory(planted.model)
    assert not examine(model, planted.batches, select=["BN702"])
