"""What is said of Inception where it cannot do without batch normalization."""

import pytest

from batchnorm.experiments.imagenet.failures import Failures
from tests.experiments.made_up import SETTINGS, curve, train_all


@pytest.mark.parametrize(("classes", "near", "above"), [(10, 0.15, 0.1501), (1_000, 0.0015, 0.00152)])
def test_a_network_near_chance_has_failed_and_one_above_has_learned(classes, near, above):
    claim = Failures(classes)

    def outcome(plain: float, with_bn: float) -> str:
        curves = train_all(claim, SETTINGS, lambda name: {100: plain if "inception" in name else with_bn})
        return claim.verdict(SETTINGS, curves).outcome

    assert outcome(near, above) == "seen"
    assert outcome(near / 10, 0.9) == "seen"
    assert outcome(above, 0.9) == "not seen here"
    assert outcome(near, near) == "not seen here"


def test_a_network_that_diverged_has_failed_however_good_it_was():
    claim = Failures(10)
    curves = train_all(claim, SETTINGS, lambda name: {100: 0.1 if "inception" in name else 0.9})
    faster = "inception-x5-seed1"
    curves[faster] = curve(faster, curves[faster].config, {100: 0.6, 150: 0.1}, diverged=True)
    verdict = claim.verdict(SETTINGS, curves)
    assert verdict.outcome == "seen"
    assert "(1 of 2 diverged)" in verdict.measured
    assert "Chance is 10.0 %." in verdict.measured
    with_bn = "bn-x5-seed0"
    curves[with_bn] = curve(with_bn, curves[with_bn].config, {100: 0.9}, diverged=True)
    assert claim.verdict(SETTINGS, curves).outcome == "not seen here"
