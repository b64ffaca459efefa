"""Networks of section 4.2 that were never trained: their curves are made up, for the judges to say something of."""

import math
from collections.abc import Callable
from typing import Any

from batchnorm.experiments.claim import Claim, Curve
from batchnorm.experiments.imagenet.figure_3 import Figure3
from batchnorm.experiments.imagenet.inception_settings import ImagenetSettings
from batchnorm.records import Evaluation, Result, Verdict
from batchnorm.training.config import Config

SETTINGS = ImagenetSettings(seeds=2, steps=16_000, rates=(0.02,))
FIVE = ("inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid")
# at which steps a network has which accuracy, by the network's name in the records
Accuracies = Callable[[str], dict[int, float]]


def curve(
    job: str, config: Any, accuracies: dict[int, float], diverged: bool = False, moving: float | None = None
) -> Curve[Any]:
    evaluations = [
        Evaluation(job=job, step=step, loss=1.0, accuracy=accuracy) for step, accuracy in accuracies.items()
    ]
    result = Result(
        job=job,
        config=config.model_dump(mode="json"),
        steps=evaluations[-1].step,
        diverged=diverged,
        loss=math.nan if diverged else 1.0,
        accuracy=evaluations[-1].accuracy,
        accuracy_moving=moving,
        seconds=1.0,
    )
    return Curve(config, evaluations, result)


def train_all(claim: Claim[Any, Any], settings: Any, accuracies: Accuracies) -> dict[str, Curve[Any]]:
    curves: dict[str, Curve[Any]] = {}
    while missing := {n: c for n, c in claim.jobs(settings, curves).items() if n not in curves}:
        curves |= {name: curve(name, config, accuracies(name)) for name, config in missing.items()}
    return curves


def judged(of: dict[str, dict[int, float]], settings: ImagenetSettings = SETTINGS) -> Verdict:
    """Figure 3 of networks whose accuracies are `of`, by variant, or by variant and seed; the others' is 0.1."""
    claim = Figure3(60_000)
    curves = train_all(
        claim, settings, lambda name: of.get(name, of.get(name.rsplit("-seed", 1)[0], {100: 0.1}))
    )
    return claim.verdict(settings, curves)


def main_rows(verdict: Verdict) -> dict[str, list[str]]:
    table = verdict.tables["Steps to Inception's best accuracy, and the best accuracy of each"]
    assert table.columns[0] == "network"
    return {row[0]: row[1:] for row in table.rows}


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """The keys of run.toml in which the two are not the same."""
    return {
        f"{section}.{key}": (value, theirs[key])
        for section, values in one.model_dump().items()
        for theirs in [other.model_dump()[section]]
        for key, value in values.items()
        if value != theirs[key]
    }
