"""The MNIST experiment: its claims by name."""

from __future__ import annotations

from batchnorm.experiments.claim import Claim, Settings
from batchnorm.experiments.figure_1 import Figure1
from batchnorm.experiments.higher_rates import HigherRates
from batchnorm.experiments.initial_weights import InitialWeights
from batchnorm.experiments.regularization import Regularization
from batchnorm.experiments.run import Experiment
from batchnorm.experiments.saturation import Saturation

# Figure 1 comes last: its verdict is the headline, and the last record.
_CLAIMS: dict[str, type[Claim]] = {
    claim.name: claim for claim in (HigherRates, InitialWeights, Saturation, Regularization, Figure1)
}


def claim_names() -> tuple[str, ...]:
    """The names that `Settings.claims` may hold, in the order in which they are judged."""
    return tuple(_CLAIMS)


def claim_title(name: str) -> str:
    """What the claim of that name says, in one sentence."""
    return _CLAIMS[name].title


def mnist_experiment(settings: Settings) -> Experiment:
    """Section 4.1 with the claims of `settings`."""
    claims = [_CLAIMS[name]() for name in _CLAIMS if name in settings.claims]
    return Experiment("mnist", "Batch normalization on handwritten digits", claims)
