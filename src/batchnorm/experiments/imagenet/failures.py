"""Section 4.2.2: without batch normalization Inception fails at higher rates and with sigmoids.

Claim     at five times its rate Inception's parameters reach machine infinity; with sigmoids it stays at chance
Source    Ioffe & Szegedy 2015, section 4.2.2
Expected  both fail from every seed, while BN-x5 and BN-x5-Sigmoid learn
Cost      two more networks a seed, of a fifth of Inception's steps
Measured  docs/experiments.md
"""

from __future__ import annotations

from batchnorm.experiments.claim import Claim, Curve, Curves, Finding, percent, seeds_note, spread
from batchnorm.experiments.imagenet import variants
from batchnorm.experiments.imagenet.inception_settings import ImagenetSettings
from batchnorm.experiments.imagenet.variants import NAMES, job
from batchnorm.records import Chart, Table
from batchnorm.training.config import Config

FASTER = "inception-x5"
SIGMOID = "inception-sigmoid"
_WITHOUT = {FASTER: "Inception at 5 times the rate", SIGMOID: "Inception with sigmoids"}
_WITH = {FASTER: "bn-x5", SIGMOID: "bn-x5-sigmoid"}
NEAR_CHANCE = 1.5  # times the share that guessing gets


class Failures(Claim[ImagenetSettings, Config]):
    """Inception without BN at five times its rate, and with sigmoids, each beside the network with BN.

    classes: of the data set; the accuracy of guessing is 1 / classes.
    """

    name = "failures"
    title = "Without batch normalization Inception takes neither the higher rate nor sigmoids"
    source = "section 4.2.2"
    expected = (
        f"without BN both diverge or end at no more than {NEAR_CHANCE:g} times chance, from every seed; with BN both "
        "learn"
    )

    def __init__(self, classes: int) -> None:
        self._chance = 1 / classes

    def choices(self, settings: ImagenetSettings) -> list[str]:
        """See `Claim.choices`."""
        length = variants.steps(settings, "bn-x5")
        return [
            f"Each is trained for {length:,} steps, as BN-x5 is. Inception with sigmoids has Inception's rate."
        ]

    def jobs(self, settings: ImagenetSettings, curves: Curves) -> dict[str, Config]:
        """The two networks without BN, expected to fail, and the two with BN, for every seed."""
        jobs = variants.sweep(settings)
        rate = variants.best_rate(settings, curves)
        if rate is None:
            return jobs
        length = variants.steps(settings, "bn-x5")
        for seed in range(settings.seeds):
            plain = variants.truncate(variants.inception(settings, rate, seed, settings.steps), length)
            jobs[job(FASTER, seed)] = plain.with_values("optimizer", rate=5 * rate)
            jobs[job(SIGMOID, seed)] = plain.with_values("model", activation="sigmoid")
            for name in _WITH.values():
                jobs[job(name, seed)] = variants.variant(settings, name, rate, seed)
        return jobs

    def charts(self, settings: ImagenetSettings, curves: Curves) -> list[Chart]:
        """None; the table is enough."""
        return []

    def find(self, settings: ImagenetSettings, curves: Curves) -> Finding:
        """The final accuracies without and with BN."""
        seeds = range(settings.seeds)
        without = {name: [curves[job(name, seed)] for seed in seeds] for name in _WITHOUT}
        with_bn = {name: [curves[job(other, seed)] for seed in seeds] for name, other in _WITH.items()}
        failed = [self._has_failed(curve) for found in without.values() for curve in found]
        learned = [not self._has_failed(curve) for found in with_bn.values() for curve in found]
        rows = [
            [
                _WITHOUT[name],
                _ends(without[name]),
                NAMES[_WITH[name]],
                _ends(with_bn[name]),
            ]
            for name in _WITHOUT
        ]
        measured = "; ".join(
            f"{_WITHOUT[name]}: {_ends(without[name])}, {NAMES[_WITH[name]]}: {_ends(with_bn[name])}"
            for name in _WITHOUT
        )
        return Finding(
            all(failed) and all(learned),
            f"{measured}. Chance is {percent(self._chance)}.",
            {
                "Accuracy in the end, without and with BN": Table(
                    columns=["without BN", "in the end", "with BN", "in the end"],
                    rows=rows,
                    note=f"{seeds_note(settings.seeds)}.",
                )
            },
        )

    def _has_failed(self, curve: Curve[Config]) -> bool:
        """Whether it diverged or ended near chance."""
        assert curve.result is not None
        return curve.result.diverged or curve.result.accuracy <= NEAR_CHANCE * self._chance


def _ends(curves: list[Curve[Config]]) -> str:
    diverged = sum(curve.result is not None and curve.result.diverged for curve in curves)
    last = spread((curve.evaluations[-1].accuracy for curve in curves), "{:.2%}")
    return f"{last} ({diverged} of {len(curves)} diverged)" if diverged else last
