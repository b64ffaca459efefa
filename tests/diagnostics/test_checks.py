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
ALONE = [each for each in CHECKS if each.code not in SEVERAL_PROCESSES]


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
