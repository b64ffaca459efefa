"""Saturating nonlinearities: with batch normalization a deep stack of sigmoids does not get stuck.

Claim     BN makes it possible to use saturating nonlinearities by preventing the network from getting stuck
          in their saturated regimes
Source    Ioffe & Szegedy 2015, abstract and section 4.2.2: Inception with sigmoids stays at chance, with BN
          it reaches 69.8 %
Expected  eight layers of sigmoids: at chance without BN at every rate and scale tried, 85 % or more with BN
Cost      about 3 minutes on two cores
Measured  docs/experiments.md
"""

from __future__ import annotations

from batchnorm.experiments.claim import Curves, Finding, label, percent
from batchnorm.experiments.mnist.digits_settings import DigitsSettings
from batchnorm.experiments.mnist.sweep import Sweep, SweepClaim
from batchnorm.training.digits_trainer import Training

LAYERS = 8
STEPS = 3_000
RATES = (0.1, 1.0, 3.0)
STDS = (0.1, 0.3)
CHANCE, TRAINS = 0.15, 0.85


class Saturation(SweepClaim):
    """A stack of eight sigmoid layers, at several rates and scales, to be fair to the baseline."""

    name = "saturation"
    title = "With batch normalization a deep stack of sigmoids does not get stuck"
    source = "abstract and section 4.2.2"
    expected = (
        f"without BN {percent(CHANCE, 0)} or less at every setting, with BN {percent(TRAINS, 0)} at the best"
    )

    def choices(self, settings: DigitsSettings) -> list[str]:
        """See `Claim.choices`."""
        return [
            f"{LAYERS} hidden layers of 100 sigmoids, {min(settings.steps, STEPS):,} steps of plain SGD.",
            f"Learning rates {', '.join(f'{rate:g}' for rate in RATES)} and initial weights of standard deviation "
            f"{' and '.join(f'{std:g}' for std in STDS)} (0.3 keeps the variance of a signal through small sigmoids).",
        ]

    def sweeps(self, settings: DigitsSettings) -> list[Sweep]:
        """See `SweepClaim.sweeps`."""

        def sweep(std: float) -> Sweep:
            return Sweep(
                name=f"deep-std{std:g}",
                title=f"initial weights {std:g}",
                setting="learning rate",
                values=RATES,
                training=lambda bn, rate, seed: Training(
                    batch_norm=bn,
                    rate=rate,
                    steps=min(settings.steps, STEPS),
                    seed=seed,
                    init_std=std,
                    hidden=(100,) * LAYERS,
                ),
            )

        return [sweep(std) for std in STDS]

    def picture(self, settings: DigitsSettings) -> str:
        """See `SweepClaim.picture`."""
        return f"{LAYERS} layers of sigmoids: test accuracy after {min(settings.steps, STEPS):,} steps"

    def find(self, settings: DigitsSettings, curves: Curves) -> Finding:
        """The best of all settings, with and without BN."""
        sweeps = self.sweeps(settings)
        best = {
            bn: max((s.median(settings, curves, bn, rate), s.title, rate) for s in sweeps for rate in RATES)
            for bn in (True, False)
        }
        stuck = {
            bn: sum(s.median(settings, curves, bn, rate) <= CHANCE for s in sweeps for rate in RATES)
            for bn in (True, False)
        }
        measured = "; ".join(
            f"{label(bn)} {percent(best[bn][0])} (rate {best[bn][2]:g}, {best[bn][1]})"
            for bn in (False, True)
        )
        return Finding(
            best[False][0] <= CHANCE and best[True][0] >= TRAINS,
            f"Stuck at chance in {stuck[False]} of {len(STDS) * len(RATES)} settings without BN, {stuck[True]} with. "
            f"Best of all settings: {measured}.",
            {f"Final test accuracy, {sweep.title}": sweep.table(settings, curves) for sweep in sweeps},
        )
