"""What is said of the seven changes, each left out."""

from batchnorm.experiments.imagenet.ablation import Ablation
from batchnorm.experiments.imagenet.inception_settings import ImagenetSettings
from batchnorm.records import Verdict
from tests.experiments.made_up import SETTINGS, train_all


def ablated(best: dict[int, float], settings: ImagenetSettings = SETTINGS) -> Verdict:
    claim = Ablation()

    def accuracies(name: str) -> dict[int, float]:
        variant, seed = name.rsplit("-seed", 1)
        number = int(variant.rsplit("-", 1)[1]) if "without" in variant else 0
        return {100: best.get(number, 0.88) + 0.01 * (int(seed) - 0.5)}

    return claim.verdict(settings, train_all(claim, settings, accuracies))


def test_the_ablation_says_what_is_missed_most():
    verdict = ablated({0: 0.9, 4: 0.7})
    assert verdict.outcome == "seen"
    assert verdict.measured.startswith("BN-x5 ends at 90.00 % ± 0.71 %. It misses most")
    assert "'faster decay': -20.00 points without it. No change is better left out." in verdict.measured
    (table,) = verdict.tables.values()
    assert table.rows[0] == ["all seven", "90.00 % ± 0.71 %", ""]
    assert table.rows[1] == ["without 1, higher learning rate", "88.00 % ± 0.71 %", "-2.00"]
    assert [row[0][:9] for row in table.rows[1:]] == [f"without {number}" for number in range(1, 8)]


def test_the_ablation_is_not_seen_when_a_network_is_better_without_by_more_than_the_noise():
    # the standard deviation of 0.895 and 0.905 is 0.0071
    assert ablated({0: 0.9, 2: 0.907}).outcome == "seen"
    verdict = ablated({0: 0.9, 2: 0.908, 6: 0.92})
    assert verdict.outcome == "not seen here"
    assert "It is better off without no dropout, more thorough shuffling." in verdict.measured
