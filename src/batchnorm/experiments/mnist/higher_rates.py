"""Higher learning rates: with batch normalization a network still trains where it would diverge without.

Claim     BN enables higher learning rates; without it they make parameters explode or get stuck
Source    Ioffe & Szegedy 2015, section 3.3; section 4.2.2, where Inception at 5 times its rate reaches machine
          infinity and BN-Inception trains at 5 and 30 times
Expected  the highest rate that still trains is at least 5 times higher with BN, in the ReLU network
Cost      about 3 minutes on two cores
Measured  docs/experiments.md
"""

from __future__ import annotations

from batchnorm.experiments.claim import Curves, Finding, percent
from batchnorm.experiments.mnist.digits_settings import DigitsSettings
from batchnorm.experiments.mnist.sweep import Sweep, SweepClaim
from batchnorm.models.mlp import Nonlinearity
from batchnorm.training.digits_trainer import Training

RATES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
STEPS = 1_500
TRAINS = 0.80
FACTOR = 5


class HigherRates(SweepClaim):
    """A sweep over learning rates, for ReLU (Inception's nonlinearity) and for figure 1's sigmoid."""

    name = "higher-rates"
    title = "Batch normalization enables higher learning rates"
    source = "sections 3.3 and 4.2.2"
    expected = f"the highest rate that still trains is at least {FACTOR} times higher with BN (ReLU network)"

    def choices(self, settings: DigitsSettings) -> list[str]:
        """See `Claim.choices`."""
        return [
            f"Network of figure 1, with ReLU and with sigmoids; {min(settings.steps, STEPS):,} steps of plain SGD.",
            f"The highest rate that 'still trains' is found going up from the most accurate one, as long as the "
            f"network ends at {percent(TRAINS, 0)} or more (median over seeds).",
        ]

    def sweeps(self, settings: DigitsSettings) -> list[Sweep]:
        """See `SweepClaim.sweeps`."""

        def sweep(nonlinearity: Nonlinearity, title: str) -> Sweep:
            return Sweep(
                name=f"rates-{nonlinearity}",
                title=title,
                setting="learning rate",
                values=RATES,
                training=lambda bn, rate, seed: Training(
                    batch_norm=bn,
                    rate=rate,
                    steps=min(settings.steps, STEPS),
                    seed=seed,
                    init_std=settings.init_std,
                    nonlinearity=nonlinearity,
                ),
            )

        return [sweep("relu", "ReLU network"), sweep("sigmoid", "sigmoid network")]

    def picture(self, settings: DigitsSettings) -> str:
        """See `SweepClaim.picture`."""
        return f"Test accuracy after {min(settings.steps, STEPS):,} steps against the learning rate"

    def find(self, settings: DigitsSettings, curves: Curves) -> Finding:
        """The highest rate that still trains, with and without BN, and their ratio."""
        relu, sigmoid = self.sweeps(settings)
        highest = {
            sweep.name: {bn: _highest(sweep, settings, curves, bn) for bn in (True, False)}
            for sweep in (relu, sigmoid)
        }
        measured = " ".join(
            f"{sweep.title}: {_rate(highest[sweep.name][True])} with BN, {_rate(highest[sweep.name][False])} "
            "without."
            for sweep in (relu, sigmoid)
        )
        with_bn, without = highest[relu.name][True], highest[relu.name][False]
        seen = without > 0 and with_bn >= FACTOR * without  # a baseline that trains at no rate shows nothing
        tables = {
            f"Final test accuracy, {sweep.title}": sweep.table(settings, curves) for sweep in (relu, sigmoid)
        }
        return Finding(seen, f"Highest rate that still trains. {measured}", tables)


def _highest(sweep: Sweep, settings: DigitsSettings, curves: Curves, bn: bool) -> float:
    """The highest rate that trains, going up from the most accurate one; 0 if that one does not."""
    ends = {rate: sweep.median(settings, curves, bn, rate) for rate in sweep.values}
    highest = 0.0
    for rate in sweep.values[sweep.values.index(max(ends, key=lambda rate: ends[rate])) :]:
        if ends[rate] < TRAINS:
            break
        highest = rate
    return highest


def _rate(value: float) -> str:
    return f"{value:g}" if value else "none"
