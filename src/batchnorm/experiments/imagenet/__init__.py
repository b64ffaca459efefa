"""The ImageNet experiment: its claims by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from batchnorm.data.source import load
from batchnorm.experiments.claim import Claim
from batchnorm.experiments.imagenet.ablation import Ablation
from batchnorm.experiments.imagenet.failures import Failures
from batchnorm.experiments.imagenet.figure_3 import Figure3
from batchnorm.experiments.imagenet.settings import ImagenetSettings
from batchnorm.experiments.run import Experiment
from batchnorm.training.config import Config
from batchnorm.training.trainer import Trainer

_SCALES = {
    "scaled": "BN-Inception, scaled down to {data}",
    "quick": "BN-Inception, scaled down to {data}, in a hurry",
    "paper": "BN-Inception on {data}",
}
# Figure 3 comes last: its verdict is the headline, and the last record.
_CLAIMS: dict[
    str, tuple[type[Claim[ImagenetSettings, Config]], Callable[[int], Claim[ImagenetSettings, Config]]]
] = {
    Ablation.name: (Ablation, lambda classes: Ablation()),
    Failures.name: (Failures, Failures),
    Figure3.name: (Figure3, lambda classes: Figure3()),
}


def claim_names() -> tuple[str, ...]:
    """The names that `ImagenetSettings.claims` may hold, in the order in which they are judged."""
    return tuple(_CLAIMS)


def claim_title(name: str) -> str:
    """What the claim of that name says, in one sentence."""
    return _CLAIMS[name][0].title


def imagenet_experiment(settings: ImagenetSettings) -> Experiment[ImagenetSettings, Config]:
    """Section 4.2 with the claims of `settings`.

    Raises: DataError when the data cannot be loaded.
    """
    train, validation = load(settings.data, "train"), load(settings.data, "val")
    claims = [make(train.classes) for name, (_, make) in _CLAIMS.items() if name in settings.claims]
    described = (
        f"{settings.data}: {len(train):,} training and {len(validation):,} validation images in {train.classes} "
        f"classes, at {settings.image_size} pixels"
    )
    title = _SCALES[settings.scale].format(data=settings.data)
    return Experiment("imagenet", title, claims, described, _trainer)


def _trainer(config: Config, job: str, folder: Path) -> Trainer:
    return Trainer(config, job)
