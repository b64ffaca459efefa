"""Which six networks are an ensemble, and what is said of them."""

import json

import torch

from batchnorm.experiments.claim import Curve
from batchnorm.experiments.imagenet.ensemble import Ensemble
from batchnorm.experiments.imagenet.ensemble_settings import EnsembleSettings
from batchnorm.experiments.imagenet.figure_3 import Figure3
from batchnorm.records import Verdict
from batchnorm.training import checkpoint
from batchnorm.training.config import Config
from batchnorm.training.prediction import Prediction
from tests.experiments.made_up import SETTINGS, curve, differences, train_all

SIX = EnsembleSettings(images=40, steps=SETTINGS.steps, rate=0.02)


def test_the_six_networks_are_bn_x30_each_modified_as_the_paper_says():
    jobs = Ensemble(10_000).jobs(SIX, {})
    x30 = Figure3(60_000).jobs(SETTINGS, {})["bn-x30-seed0"]
    assert list(jobs) == [f"member-{number}" for number in range(1, 7)]
    modified = set()
    for number, config in enumerate(jobs.values(), 1):
        assert isinstance(config, Config)
        found = differences(x30, config)
        assert found.pop("evaluation.images") == (None, 40)
        assert found.pop("training.seed", (0, 0)) == (0, number - 1)
        assert found  # no member is plain
        assert set(found) <= {"model.init_gain", "model.dropout", "model.per_activation"}
        assert found.get("model.dropout", (0.0, 0.05))[1] in (0.05, 0.1)
        assert found.get("model.init_gain", (1.0, 2.0))[1] > 1
        modified.add(json.dumps(sorted((key, after) for key, (_, after) in found.items())))
    assert len(modified) == 6  # each in its own way


def test_a_network_predicts_once_it_has_been_trained():
    claim = Ensemble(30)
    networks = claim.jobs(SIX, {})
    one = {"member-3": curve("member-3", networks["member-3"], {100: 0.9})}
    jobs = claim.jobs(SIX, one)
    assert set(jobs) - set(networks) == {"member-3-144-crops"}
    prediction = jobs["member-3-144-crops"]
    assert isinstance(prediction, Prediction)
    assert (prediction.network, prediction.config) == ("member-3", networks["member-3"])
    assert prediction.images == 30  # there are no 40
    unended = {"member-3": Curve(networks["member-3"], one["member-3"].evaluations)}
    assert claim.jobs(SIX, unended) == networks


LABELS = torch.tensor([0, 1, 2, 0])
RIGHT = torch.eye(3)[LABELS]
WRONG = torch.eye(3)[(LABELS + 1) % 3]


def ensemble(folder, single: list[torch.Tensor], multi: list[torch.Tensor]) -> Verdict:
    """The verdict on six networks that gave these probabilities, (4, 3) each."""
    claim = Ensemble(10_000)
    curves = train_all(claim, SIX, lambda name: {100: 0.5})
    for number, (one, many) in enumerate(zip(single, multi, strict=True), 1):
        name = f"member-{number}-144-crops"
        curves[name].checkpoint = folder / f"{name}.pt"
        said = {"probabilities": {1: one, 144: many}, "labels": {1: LABELS, 144: LABELS}}
        checkpoint.save(said, folder / f"{name}.pt")
    return claim.verdict(SIX, curves)


def mostly(right: list[int], sure: float) -> torch.Tensor:
    """Probabilities that favour the class on the images `right`, and the one after it on the others."""
    likely = torch.where(torch.tensor([n in right for n in range(4)])[:, None], RIGHT, WRONG)
    return likely * sure + (1 - likely) * (1 - sure) / 2


def test_the_ensemble_is_the_arithmetic_mean_of_the_probabilities(tmp_path):
    # On image 0 one network is sure of the truth and five lean to an error: 1.0 + 5 * 0.35 > 5 * 0.4 for it. A vote,
    # or the mean of logarithms (two networks exclude the truth), would be wrong.
    timid = mostly([1, 2], 0.5)
    timid[0] = torch.tensor([0.35, 0.4, 0.25])
    timid[3] = torch.tensor([0.0, 0.6, 0.4])
    sure = mostly([0], 0.98)
    sure[0] = torch.tensor([1.0, 0.0, 0.0])
    verdict = ensemble(tmp_path, [timid] * 6, [sure, *[timid] * 5])
    (table,) = verdict.tables.values()
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["network 1"][::2] == ["50.00 %", "25.00 %"]
    assert rows["network 2"][::2] == ["50.00 %", "50.00 %"]
    assert rows["ensemble of all six"] == ["50.00 %", "100.00 %", "75.00 %", "100.00 %"]  # of three classes
    assert verdict.outcome == "seen"
    assert "The ensemble gets 75.00 % right over 144 crops and 50.00 % by a single one" in verdict.measured
    assert "50.00 % over 144 crops and 50.00 % by a single one. 4 images." in verdict.measured


def test_the_ensemble_must_beat_the_best_network_by_one_crop_as_well_as_by_144(tmp_path):
    # three networks right on 0 and 1, three on 2 and 3, all a little surer of what is right: together all are right
    halves = [*[mostly([0, 1], 0.6)] * 3, *[mostly([2, 3], 0.6)] * 3]
    for number, each in enumerate(halves):
        halves[number] = torch.where((each == each.max(1, keepdim=True).values) & (RIGHT == 0), 0.5, each)
    assert ensemble(tmp_path, [mostly([], 0.6)] * 6, halves).outcome == "seen"
    # right by one crop is not enough
    assert ensemble(tmp_path, halves, [mostly([], 0.6)] * 6).outcome == "not seen here"
    # no better than one of them alone by 144 crops, or by one
    alone = [*halves[:5], mostly([0, 1, 2, 3], 0.5)]
    assert ensemble(tmp_path, [mostly([], 0.6)] * 6, alone).outcome == "not seen here"
    single = [*[mostly([], 0.6)] * 5, mostly([0, 1, 2, 3], 0.6)]
    assert ensemble(tmp_path, single, halves).outcome == "not seen here"


def test_figure_4_stands_below_ours(tmp_path):
    verdict = ensemble(tmp_path, [RIGHT] * 6, [RIGHT] * 6)
    (table,) = verdict.tables.values()
    # top-1 errors of 25.2, 21.99 and 20.1 %, top-5 errors of 7.82, 5.82 and 4.9 %
    assert table.rows[-2:] == [
        ["paper: one network", "74.80 %", "92.18 %", "78.01 %", "94.18 %"],
        ["paper: ensemble", "–", "–", "79.90 %", "95.10 %"],
    ]
    assert verdict.outcome == "not seen here"  # all are perfect, so the ensemble is no better


def test_the_choices_name_every_modification():
    said = " ".join(Ensemble(10_000).choices(SIX))
    assert "1: initial weights × 2; 2: dropout 5 %; 3: dropout 10 %; 4: per-activation BN" in said
    assert "40 validation images" in said
    assert "BN-x30 at 0.6, trained for 3,200 steps" in said
