"""Careless initial weights: with batch normalization their scale hardly matters.

Claim     BN makes training resilient to the scale of the parameters, for BN((aW)u) = BN(Wu)
Source    Ioffe & Szegedy 2015, section 3.3 (and the abstract: "be less careful about initialization")
Expected  80 % or more over 5 decades of the standard deviation with BN; without, at 3 of the 6 scales at most
Cost      about 2 minutes on two cores
Measured  docs/experiments.md
"""

from __future__ import annotations

from batchnorm.experiments.claim import Curves, Finding, percent
from batchnorm.experiments.mnist.digits_settings import DigitsSettings
from batchnorm.experiments.mnist.sweep import Sweep, SweepClaim
from batchnorm.training.digits_trainer import Training

STDS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
STEPS = 3_000
RATE = 0.3
TRAINS = 0.80


class InitialWeights(SweepClaim):
    """A sweep over five decades of the initial weights' standard deviation."""

    name = "initial-weights"
    title = "With batch normalization the scale of the initial weights hardly matters"
    source = "section 3.3"
    expected = f"{percent(TRAINS, 0)} or more at every scale over 5 decades with BN; without, at 3 of 6 scales at most"

    def choices(self, settings: DigitsSettings) -> list[str]:
        """See `Claim.choices`."""
        return [
            f"Sigmoid network of figure 1, learning rate {RATE:g}, {min(settings.steps, STEPS):,} steps.",
            "The scale is that of the hidden layers, those that BN follows; the output layer keeps 0.1.",
        ]

    def sweeps(self, settings: DigitsSettings) -> list[Sweep]:
        """See `SweepClaim.sweeps`."""
        sweep = Sweep(
            name="scale",
            title="",
            setting="standard deviation of the initial weights",
            values=STDS,
            training=lambda bn, std, seed: Training(
                batch_norm=bn, rate=RATE, steps=min(settings.steps, STEPS), seed=seed, init_std=std
            ),
        )
        return [sweep]

    def picture(self, settings: DigitsSettings) -> str:
        """See `SweepClaim.picture`."""
        return (
            f"Test accuracy after {min(settings.steps, STEPS):,} steps against the scale of initial weights"
        )

    def find(self, settings: DigitsSettings, curves: Curves) -> Finding:
        """At how many of the scales each network trains."""
        (sweep,) = self.sweeps(settings)
        trains = {
            bn: [s for s in sweep.values if sweep.median(settings, curves, bn, s) >= TRAINS]
            for bn in (True, False)
        }
        worst = {bn: min(sweep.median(settings, curves, bn, s) for s in sweep.values) for bn in (True, False)}
        return Finding(
            len(trains[True]) == len(STDS) and len(trains[False]) <= 3,
            f"With BN {len(trains[True])} of {len(STDS)} scales end at {percent(TRAINS, 0)} or more "
            f"(worst {percent(worst[True])}), without {len(trains[False])} (worst {percent(worst[False])}).",
            {"Final test accuracy": sweep.table(settings, curves)},
        )
