"""The MNIST experiment: its claims by name."""

from __future__ import annotations

from functools import partial

from batchnorm.data.digits import Digits
from batchnorm.experiments.claim import Claim
from batchnorm.experiments.mnist.digits_settings import DigitsSettings
from batchnorm.experiments.mnist.figure_1 import Figure1
from batchnorm.experiments.mnist.higher_rates import HigherRates
from batchnorm.experiments.mnist.initial_weights import InitialWeights
from batchnorm.experiments.mnist.regularization import Regularization
from batchnorm.experiments.mnist.saturation import Saturation
from batchnorm.experiments.run import Experiment
from batchnorm.training.digits_trainer import Training, digits_trainer

# In the order of their verdicts. The last one is the headline of the report.
_CLAIMS: dict[str, type[Claim[DigitsSettings, Training]]] = {
    claim.name: claim for claim in (HigherRates, InitialWeights, Saturation, Regularization, Figure1)
}
_TITLES = {"mnist-10k": "handwritten digits", "mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}


def claim_names() -> tuple[str, ...]:
    """The names that `Settings.claims` may hold, in the order in which they are judged."""
    return tuple(_CLAIMS)


def claim_title(name: str) -> str:
    """The claim `name` in one sentence."""
    return _CLAIMS[name].title


def mnist_experiment(settings: DigitsSettings, data: Digits) -> Experiment[DigitsSettings, Training]:
    """Section 4.1 with the claims of `settings`, on `data`.

    Raises: DataError when the data do not fill one batch.
    """
    data.expect_batch(Training.model_fields["batch_size"].default)
    title = f"Batch normalization on {_TITLES.get(settings.data, settings.data)}"
    claims = [_CLAIMS[name]() for name in _CLAIMS if name in settings.claims]
    described = f"{data.describe(settings.data)}, made binary: 1 where a pixel is above 127 of 255"
    return Experiment("mnist", title, claims, described, partial(digits_trainer, settings.data))
