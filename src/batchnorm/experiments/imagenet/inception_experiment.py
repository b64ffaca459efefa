"""The ImageNet experiments: figure 3 with its claims, and the ensemble."""

from __future__ import annotations

from pathlib import Path

from batchnorm.data.catalogue import load
from batchnorm.data.source import Source
from batchnorm.experiments.claim import Claim
from batchnorm.experiments.imagenet.ablation import Ablation
from batchnorm.experiments.imagenet.ensemble import Ensemble
from batchnorm.experiments.imagenet.ensemble_settings import EnsembleSettings
from batchnorm.experiments.imagenet.failures import Failures
from batchnorm.experiments.imagenet.figure_3 import Figure3
from batchnorm.experiments.imagenet.inception_settings import ImagenetSettings, InceptionSettings
from batchnorm.experiments.run import Experiment
from batchnorm.training.config import Config
from batchnorm.training.prediction import Prediction, Predictor
from batchnorm.training.trainer import Trainer

_SCALES = {
    "scaled": "BN-Inception, scaled down to {data}",
    "quick": "BN-Inception, scaled down to {data}, quick run",
    "paper": "BN-Inception on {data}",
}
# In the order of their verdicts. The last one is the headline of the report.
_CLAIMS = (Ablation, Failures, Figure3)


def claim_names() -> tuple[str, ...]:
    """The names that `ImagenetSettings.claims` may hold, in the order in which they are judged."""
    return tuple(claim.name for claim in _CLAIMS)


def claim_title(name: str) -> str:
    """The claim `name` in one sentence."""
    return next(claim.title for claim in _CLAIMS if claim.name == name)


def imagenet_experiment(settings: ImagenetSettings) -> Experiment[ImagenetSettings, Config]:
    """Section 4.2 with the claims of `settings`.

    Raises: DataError when the data cannot be loaded.
    """
    train, validation = load(settings.data, "train"), load(settings.data, "val")
    every: list[Claim[ImagenetSettings, Config]] = [Ablation(), Failures(train.classes), Figure3(len(train))]
    claims = [claim for claim in every if claim.name in settings.claims]
    return Experiment(
        "imagenet", _title(settings), claims, _describe_data(settings, train, validation), _make_trainer
    )


def ensemble_experiment(
    settings: EnsembleSettings,
) -> Experiment[EnsembleSettings, Config | Prediction]:
    """Section 4.2.3. Raises: DataError when the data cannot be loaded."""
    train, validation = load(settings.data, "train"), load(settings.data, "val")
    return Experiment(
        "ensemble",
        f"An ensemble of six: {_title(settings)}",
        [Ensemble(len(validation))],
        _describe_data(settings, train, validation),
        _make_trainer,
    )


def _title(settings: InceptionSettings) -> str:
    return _SCALES[settings.scale].format(data=settings.data)


def _describe_data(settings: InceptionSettings, train: Source, validation: Source) -> str:
    return (
        f"{settings.data}: {len(train):,} training and {len(validation):,} validation images in {train.classes} "
        f"classes, at {settings.image_size} pixels"
    )


def _make_trainer(config: Config | Prediction, job: str, folder: Path) -> Trainer | Predictor:
    return Predictor(config, job, folder) if isinstance(config, Prediction) else Trainer(config, job)
