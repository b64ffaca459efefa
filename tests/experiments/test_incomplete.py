"""What the claims of section 4.2 say of runs that were stopped."""

import itertools
import json
import math
import random
from typing import Any

import pytest

from batchnorm.experiments.claim import Claim, Curve
from batchnorm.experiments.imagenet.ensemble import Ensemble
from batchnorm.experiments.imagenet.ensemble_settings import EnsembleSettings
from batchnorm.experiments.imagenet.inception_experiment import (
    claim_names,
    ensemble_experiment,
    imagenet_experiment,
)
from batchnorm.experiments.imagenet.inception_settings import ImagenetSettings
from tests.experiments.made_up import train_all

SMALL = {"data": "mnist-10k", "steps": 1_000, "claims": claim_names()}


def claims() -> list[tuple[Any, Claim[Any, Any]]]:
    chosen = ImagenetSettings(**SMALL, seeds=2)
    single = ImagenetSettings(**SMALL, seeds=1, rates=(0.02,))
    six = EnsembleSettings(data="mnist-10k", steps=1_000)
    return [
        *((chosen, claim) for claim in imagenet_experiment(chosen).claims),
        *((single, claim) for claim in imagenet_experiment(single).claims),
        *((six, claim) for claim in ensemble_experiment(six).claims),
    ]


@pytest.mark.parametrize(("settings", "claim"), claims(), ids=lambda each: getattr(each, "name", "with"))
def test_any_part_of_the_networks_gives_an_incomplete_verdict_and_a_chart(settings, claim):
    curves = train_all(claim, settings, lambda name: {100: 0.5, 200: 0.6})
    choose = random.Random(0)
    names = list(curves)
    parts = [{}, dict(itertools.islice(curves.items(), len(names) - 1))]
    parts += [{name: curves[name] for name in choose.sample(names, k)} for k in range(1, len(names))]
    unended = {name: Curve(each.config, each.evaluations[:1]) for name, each in curves.items()}
    parts += [unended, *(curves | {name: unended[name]} for name in names)]
    for partial in parts:
        verdict = claim.verdict(settings, partial)
        assert verdict.outcome == "incomplete"
        assert verdict.tables == {}
        for chart in claim.charts(settings, partial):
            assert chart.claim == claim.name
            for panel in chart.panels:
                assert panel.y_range is not None
                assert all(map(math.isfinite, panel.y_range))
                assert panel.lines
    if not isinstance(claim, Ensemble):  # which reads what its networks predicted
        verdict = claim.verdict(settings, curves)
        assert verdict.outcome != "incomplete"
        assert verdict.choices
        json.loads(verdict.model_dump_json())


def test_figure_3_is_judged_last():
    (*_, last) = imagenet_experiment(ImagenetSettings(**SMALL)).claims
    assert last.name == "figure-3"
    assert {*claim_names()} == {"figure-3", "failures", "ablation"}
    assert ImagenetSettings().claims == ("failures", "figure-3")
