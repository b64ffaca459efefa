"""The judges: given curves, what each claim says of them. The curves are made up, the arithmetic is not ours."""

import pytest

from batchnorm.data.digits import Digits
from batchnorm.experiments.claim import Claim, Curve, spread
from batchnorm.experiments.mnist.digits_experiment import claim_names, mnist_experiment
from batchnorm.experiments.mnist.digits_settings import DigitsSettings
from batchnorm.experiments.mnist.figure_1 import RATES, STDS, Figure1, best
from batchnorm.experiments.mnist.higher_rates import HigherRates
from batchnorm.experiments.mnist.initial_weights import InitialWeights
from batchnorm.experiments.mnist.regularization import Regularization
from batchnorm.experiments.mnist.saturation import Saturation
from batchnorm.records import Evaluation, Result
from batchnorm.training.digits_trainer import Training
from batchnorm.training.schedule import evaluation_steps

DATA = Digits.load()
SETTINGS = DigitsSettings(steps=10_000, seeds=2)


def curve(job: str, config: Training, reaches: dict[float, int], train: float = 1.0) -> Curve[Training]:
    """A network whose test accuracy jumps to each accuracy at the given step."""
    evaluations = [
        Evaluation(
            job=job,
            step=step,
            loss=1.0,
            accuracy=max([a for a, at in reaches.items() if step >= at], default=0.1),
            percentiles=(-1.0, 0.0, 1.0) if config.watch else None,
            travel=(0.1 if config.batch_norm else 1.0) * step if config.watch else None,
        )
        for step in evaluation_steps(config.steps)
    ]
    last = evaluations[-1]
    result = Result(
        job=job,
        config=config.model_dump(mode="json"),
        steps=last.step,
        diverged=False,
        loss=1.0,
        accuracy=last.accuracy,
        train_accuracy=train,
        seconds=1.0,
    )
    return Curve(config, evaluations, result)


def train_all(
    claim: Claim[DigitsSettings, Training], reaches, train=lambda config: 1.0
) -> dict[str, Curve[Training]]:
    curves: dict[str, Curve[Training]] = {}
    while missing := {n: c for n, c in claim.jobs(SETTINGS, curves).items() if n not in curves}:
        curves |= {
            name: curve(name, config, reaches(config), train(config)) for name, config in missing.items()
        }
    return curves


def test_steps_to_an_accuracy_is_the_first_evaluation_that_reaches_it():
    made = curve("a", Training(batch_norm=True, rate=0.1, steps=100, seed=0), {0.8: 31, 0.9: 100})
    assert made.steps_to(0.8) == 40  # evaluated at 30 and 40
    assert made.steps_to(0.9) == 100
    assert made.steps_to(0.91) is None


def same_rate(config: Training) -> bool:
    return config.rate == 0.1


def test_figure_1_takes_the_ratio_seed_by_seed():
    steps = {(True, 0): 100, (True, 1): 200, (False, 0): 1500, (False, 1): 2000}

    def reaches(config: Training) -> dict[float, int]:
        return {0.8: steps[config.batch_norm, config.seed]} if same_rate(config) else {}

    claim = Figure1()
    verdict = claim.verdict(SETTINGS, train_all(claim, reaches))
    assert verdict.steps_ratio == {"80": (15 + 10) / 2}
    assert verdict.outcome == "seen"
    table = verdict.tables["Steps to a test accuracy, both networks at rate 0.1"]
    assert table.rows[0] == ["80 %", "1,750 ± 354", "150 ± 71", "12.5 ± 3.5"]
    assert table.rows[1] == ["85 %", "not reached", "not reached", "–"]


def test_figure_1_does_not_average_over_seeds_that_did_not_arrive():
    def reaches(config: Training) -> dict[float, int]:
        return {} if config.seed == 1 and not config.batch_norm else {0.8: 10 if config.batch_norm else 1000}

    claim = Figure1()
    verdict = claim.verdict(SETTINGS, train_all(claim, reaches))
    assert not verdict.steps_ratio
    assert verdict.outcome == "not seen here"
    table = verdict.tables["Steps to a test accuracy, both networks at rate 0.1"]
    assert table.rows[0] == ["80 %", "reached by 1 of 2", "10 ± 0", "–"]


def test_figure_1_below_ten_times_is_not_seen():
    claim = Figure1()
    verdict = claim.verdict(SETTINGS, train_all(claim, lambda c: {0.9: 100 if c.batch_norm else 900}))
    assert verdict.steps_ratio == {"80": 9.0, "85": 9.0, "90": 9.0}
    assert verdict.outcome == "not seen here"


def test_figure_1_is_not_seen_when_the_inputs_move_more_with_batch_normalization():
    claim = Figure1()
    curves = train_all(claim, lambda c: {0.9: 100 if c.batch_norm else 2000})
    assert claim.verdict(SETTINGS, curves).outcome == "seen"
    for name, trained in curves.items():
        if trained.config.watch:
            swapped = 1000 if trained.config.batch_norm else 1
            curves[name] = Curve(
                trained.config,
                [e.model_copy(update={"travel": e.step * swapped}) for e in trained.evaluations],
                trained.result,
            )
    assert claim.verdict(SETTINGS, curves).outcome == "not seen here"


def test_each_network_gets_its_own_best_rate_and_scale():
    fast = {True: (3.0, 0.1), False: (0.3, 0.3)}

    def reaches(config: Training) -> dict[float, int]:
        return {0.9: 100 if (config.rate, config.init_std) == fast[config.batch_norm] else 500}

    claim = Figure1()
    curves = train_all(claim, reaches)
    for bn, name in ((True, "best-bn-"), (False, "best-plain-")):
        assert best(curves, bn) == fast[bn]
        configs = [c.config for n, c in curves.items() if n.startswith(name)]
        assert {(c.rate, c.init_std) for c in configs} == {fast[bn]}
        assert [c.seed for c in configs] == [0, 1]  # and the sweep had a seed of its own
    assert {c.config.seed for n, c in curves.items() if n.startswith("sweep")} == {1000}


def test_without_any_setting_that_arrives_the_most_accurate_is_the_best():
    claim = Figure1()
    curves = train_all(claim, lambda config: {0.2 + config.rate / 100 + config.init_std: 10})
    assert best(curves, True) == (RATES[-1], STDS[-1])


def test_higher_rates_compares_the_highest_rates_that_train():
    claim = HigherRates()

    def upto(bn: float, plain: float):
        return lambda c: {0.9: 10} if c.rate <= (bn if c.batch_norm else plain) else {}

    assert claim.verdict(SETTINGS, train_all(claim, upto(5, 1))).outcome == "seen"
    assert claim.verdict(SETTINGS, train_all(claim, upto(2, 1))).outcome == "not seen here"
    assert claim.verdict(SETTINGS, train_all(claim, upto(5, 0))).outcome == "not seen here"
    # a rate above one that fails does not count, a low one that is merely slow does not matter
    odd = train_all(claim, lambda c: {0.95: 10} if c.rate == 1 else {0.9: 10} if c.rate in (2, 50) else {})
    assert "ReLU network: 2 with BN, 2 without" in claim.verdict(SETTINGS, odd).measured


def test_initial_weights_wants_every_scale():
    claim = InitialWeights()
    some = {0.1, 1.0, 10.0}
    seen = train_all(claim, lambda c: {0.85: 10} if c.batch_norm or c.init_std in some else {})
    assert claim.verdict(SETTINGS, seen).outcome == "seen"
    not_all = train_all(claim, lambda c: {0.85: 10} if c.init_std < 100 and c.batch_norm else {})
    assert claim.verdict(SETTINGS, not_all).outcome == "not seen here"


def test_saturation_gives_the_baseline_its_best_setting():
    claim = Saturation()
    assert (
        claim.verdict(SETTINGS, train_all(claim, lambda c: {0.9: 10} if c.batch_norm else {})).outcome
        == "seen"
    )
    once = train_all(claim, lambda c: {0.9: 10} if c.batch_norm or (c.rate, c.init_std) == (3.0, 0.3) else {})
    assert claim.verdict(SETTINGS, once).outcome == "not seen here"


def test_regularization_compares_gaps_and_wants_no_less_accuracy_than_dropout():
    claim = Regularization()

    def verdict(gap_bn: float, test_bn: float) -> str:
        curves = train_all(
            claim,
            lambda c: {test_bn if c.batch_norm else 0.91 if c.dropout else 0.9: 10},
            lambda c: test_bn + gap_bn if c.batch_norm else 0.95,
        )
        return claim.verdict(SETTINGS, curves).outcome

    assert verdict(0.02, 0.92) == "seen"
    assert verdict(0.06, 0.92) == "not seen here"
    assert verdict(0.02, 0.905) == "not seen here"


@pytest.mark.parametrize("name", claim_names())
def test_a_claim_whose_networks_have_not_all_ended_is_incomplete(name):
    (claim,) = mnist_experiment(SETTINGS.model_copy(update={"claims": (name,)}), DATA).claims
    curves = train_all(claim, lambda config: {0.9: 10})
    cut = next(iter(curves))
    for partial in ({}, {cut: Curve(curves[cut].config, curves[cut].evaluations[:2])}):
        verdict = claim.verdict(SETTINGS, partial)
        assert verdict.outcome == "incomplete"
        assert verdict.steps_ratio is None
        claim.charts(SETTINGS, partial)  # draws what there is
    assert claim.verdict(SETTINGS, curves).outcome != "incomplete"
    assert all(chart.claim == claim.name for chart in claim.charts(SETTINGS, curves))


def test_no_run_is_longer_than_the_steps_asked_for():
    settings = DigitsSettings(steps=70, claims=claim_names())
    for claim in mnist_experiment(settings, DATA).claims:
        assert {config.steps for config in claim.jobs(settings, {}).values()} == {70}


def test_spread_says_how_many_there_are():
    assert spread([1, 3]) == "2 ± 1"
    assert spread([1234.0]) == "1,234"
    assert spread([None, 3]) == "reached by 1 of 2"
    assert spread([None]) == "not reached"
