"""Which networks the claims of section 4.2 ask for."""

from typing import Any

import pytest

from batchnorm.experiments.claim import Curve
from batchnorm.experiments.imagenet.ablation import Ablation
from batchnorm.experiments.imagenet.failures import Failures
from batchnorm.experiments.imagenet.figure_3 import PAPER_PASSES, PAPER_PASSES_OF_X30, Figure3
from batchnorm.experiments.imagenet.inception_experiment import claim_names
from batchnorm.experiments.imagenet.inception_settings import PAPER, QUICK, ImagenetSettings, preset
from tests.experiments.made_up import FIVE, SETTINGS, curve, differences, train_all

CHANGED_AT_ONCE = {
    "model.batch_norm": (False, True),
    "optimizer.rate": (0.02, 0.1),  # 1 times 5
    "model.dropout": (0.4, 0.0),  # 2
    "optimizer.weight_decay": (2e-4, 4e-5),  # 3 a fifth
    "optimizer.decay_every": (164, 27),  # 4 six times as often: 27.3
    "data.shuffle": ("shards", "within-shards"),  # 6
    "data.distortion": ("full", "reduced"),  # 7
    "training.steps": (16_000, 3_200),
}


def test_the_networks_differ_from_inception_by_what_section_4_2_1_says():
    jobs = Figure3(60_000).jobs(SETTINGS, {})
    assert list(jobs) == [f"{name}-seed{seed}" for seed in (0, 1) for name in FIVE]
    inception = jobs["inception-seed0"]
    assert inception.model.model_dump()["local_response_norm"] is False  # 5: nobody has what would be removed
    assert differences(inception, jobs["bn-baseline-seed0"]) == {"model.batch_norm": (False, True)}
    found = differences(inception, jobs["bn-x5-seed0"])
    assert found.pop("optimizer.weight_decay") == (2e-4, pytest.approx(4e-5))
    assert found == {k: v for k, v in CHANGED_AT_ONCE.items() if k != "optimizer.weight_decay"}
    x5, x30, sigmoid = (jobs[f"{name}-seed0"] for name in ("bn-x5", "bn-x30", "bn-x5-sigmoid"))
    assert differences(x5, x30) == {"optimizer.rate": (0.1, pytest.approx(0.6))}
    assert differences(x5, sigmoid) == {"model.activation": ("relu", "sigmoid")}
    for name in FIVE:
        assert differences(jobs[f"{name}-seed0"], jobs[f"{name}-seed1"]) == {"training.seed": (0, 1)}


@pytest.mark.parametrize(
    ("chosen", "decays"), [({}, 97), (PAPER, 97), ({"steps": 97_000}, 96), (QUICK, 99), ({"steps": 50}, 49)]
)
def test_the_rate_falls_as_far_as_in_the_papers_31_million_steps(chosen, decays):
    """A decay every 8 epochs of ImageNet's 1,281,167 images in batches of 32: 97 in 31 million steps."""
    assert 31_000_000 * 32 // (8 * 1_281_167) == 96  # of 40,036 batches of 32: 96.8
    assert (round(31_000_000 * 32 / 1_281_167), round(6_000_000 * 32 / 1_281_167)) == (
        PAPER_PASSES,
        PAPER_PASSES_OF_X30,
    )
    settings = ImagenetSettings(**({"seeds": 1, "rates": (0.02,)} | chosen))
    jobs = Figure3(60_000).jobs(settings, {})
    for name in ("inception", "bn-baseline"):
        config = jobs[f"{name}-seed0"]
        assert config.optimizer.decay == 0.96
        assert (config.steps - 1) // config.optimizer.decay_every == decays
    said = " ".join(Figure3(60_000).choices(settings))
    passes = settings.steps * 32 / 60_000
    assert (
        f"Inception sees every image {passes:.1f} times, and BN-x5 {settings.steps // 5 * 32 / 60_000:.1f}"
        in said
    )
    assert f"the rate decays {decays} times by 4 %, to {100 * 0.96**decays:.0f} %; in the paper" in said


def test_the_scaled_run_is_on_real_clothes_with_a_quarter_of_the_channels():
    config = Figure3(60_000).jobs(SETTINGS, {})["inception-seed0"]
    assert (config.data.source, config.data.image_size) == ("fashion-mnist", 28)
    assert config.model.model_dump()["width"] == 0.25
    paper = ImagenetSettings(**preset(False, "/data/imagenet"))
    config = Figure3(60_000).jobs(paper, {})["bn-x30-seed0"]
    assert (config.data.image_size, config.optimizer.rate) == (224, 0.045)
    assert config.model.model_dump()["width"] == 1.0
    assert Figure3(60_000).jobs(paper, {})["bn-x5-seed0"].optimizer.rate == 0.0075
    assert Figure3(60_000).jobs(paper, {})["inception-seed0"].optimizer.rate == 0.0015
    assert paper.seeds == 1


SWEPT = ImagenetSettings(seeds=2, rates=(0.005, 0.01, 0.02, 0.04), claims=claim_names())


@pytest.mark.parametrize("claim", [Figure3(60_000), Failures(10), Ablation()], ids=lambda claim: claim.name)
def test_no_network_but_the_sweeps_is_planned_before_that_has_ended(claim):
    sweep = claim.jobs(SWEPT, {})
    assert [config.optimizer.rate for config in sweep.values()] == [0.005, 0.01, 0.02, 0.04]
    first, *others = sweep.values()
    for other in others:
        assert set(differences(first, other)) == {"optimizer.rate"}
    assert not first.model.batch_norm
    assert first.training.seed not in range(SWEPT.seeds)
    assert first.steps == SWEPT.sweep_steps == 2_000
    curves = {name: curve(name, config, {100: 0.5}) for name, config in sweep.items()}
    last = next(reversed(curves))
    for partial in ({}, {k: v for k, v in curves.items() if k != last}, curves | {last: Curve(sweep[last])}):
        assert claim.jobs(SWEPT, partial) == sweep
    assert len(claim.jobs(SWEPT, curves)) > len(sweep)


def test_the_sweep_picks_the_most_accurate_rate_at_its_best_not_at_its_end():
    seen = {0.005: {100: 0.5}, 0.01: {100: 0.8, 200: 0.1}, 0.02: {100: 0.7, 200: 0.75}, 0.04: {100: 0.1}}
    claim = Figure3(60_000)
    curves = train_all(
        claim, SWEPT, lambda name: seen[float(name.split("rate")[1])] if "rate" in name else {100: 0.5}
    )
    rates = {name: curve.config.optimizer.rate for name, curve in curves.items() if "seed0" in name}
    assert rates == {
        "inception-seed0": 0.01,
        "bn-baseline-seed0": 0.01,
        "bn-x5-seed0": 0.05,
        "bn-x30-seed0": pytest.approx(0.3),
        "bn-x5-sigmoid-seed0": 0.05,
    }
    table = claim.verdict(SWEPT, curves).tables["Inception's rate"]
    assert table.rows[1] == ["0.01", "80.00 %", "10.00 %"]


def test_claims_that_share_a_network_agree_on_it():
    curves: dict[str, Curve[Any]] = {}
    for claim in (Ablation(), Failures(10), Figure3(60_000)):
        for name, trained in train_all(claim, SWEPT, lambda name: {100: 0.5}).items():
            assert curves.setdefault(name, trained).config == trained.config
    assert "bn-x5-seed0" in curves


def test_the_failures_are_inception_but_for_one_thing():
    jobs = Failures(10).jobs(SETTINGS, {})
    inception = Figure3(60_000).jobs(SETTINGS, {})["inception-seed0"]
    shorter = {"training.steps": (16_000, 3_200)}
    assert differences(inception, jobs["inception-x5-seed0"]) == shorter | {"optimizer.rate": (0.02, 0.1)}
    assert differences(inception, jobs["inception-sigmoid-seed0"]) == shorter | {
        "model.activation": ("relu", "sigmoid")
    }


LEFT_OUT = {
    1: {"optimizer.rate": (0.1, 0.02)},
    2: {"model.dropout": (0.0, 0.4)},
    3: {"optimizer.weight_decay": (pytest.approx(4e-5), 2e-4)},
    4: {"optimizer.decay_every": (27, 164)},
    5: {"model.local_response_norm": (False, True)},
    6: {"data.shuffle": ("within-shards", "shards")},
    7: {"data.distortion": ("reduced", "full")},
}


def test_the_ablation_leaves_out_each_of_the_seven_changes_and_nothing_else():
    jobs = Ablation().jobs(SETTINGS, {})
    assert len(jobs) == 8 * SETTINGS.seeds
    for seed in range(SETTINGS.seeds):
        whole = jobs[f"bn-x5-seed{seed}"]
        assert whole == Figure3(60_000).jobs(SETTINGS, {})[f"bn-x5-seed{seed}"]
        for number, changes in LEFT_OUT.items():
            assert differences(whole, jobs[f"bn-x5-without-{number}-seed{seed}"]) == changes
