"""The networks of section 4.2.2: Inception at the best of some rates, and what the recipe makes of it."""

from __future__ import annotations

from collections.abc import Collection

from batchnorm.experiments.claim import Curve, Curves, percent
from batchnorm.experiments.imagenet.inception_settings import ImagenetSettings, InceptionSettings
from batchnorm.training import recipe
from batchnorm.training.config import (
    Config,
    Data,
    Evaluations,
    InceptionModel,
    Machine,
    Optimizer,
    Schedule,
)

SWEEP_SEED = 1_000
# The paper trained Inception for 31.0e6 steps, in which a decay of 4 % every 8 epochs happens 97 times: its rate falls
# to 2 % of what it was. A shorter run has as many decays.
DECAYS = 97
# BN-x30 had its best accuracy after 6e6 steps, a fifth of Inception's.
SHARE_OF_STEPS = 5
NAMES = {
    "inception": "Inception",
    "bn-baseline": "BN-Baseline",
    "bn-x5": "BN-x5",
    "bn-x30": "BN-x30",
    "bn-x5-sigmoid": "BN-x5-Sigmoid",
}
_LONG = ("inception", "bn-baseline")


def steps(settings: InceptionSettings, variant: str) -> int:
    """How long a variant is trained."""
    return settings.steps if variant in _LONG else max(1, settings.steps // SHARE_OF_STEPS)


def inception(settings: InceptionSettings, rate: float, seed: int, length: int) -> Config:
    """Inception without BN and with none of the changes of section 4.2.1, its rate decaying over `length` steps."""
    return Config(
        model=InceptionModel(batch_norm=False, width=settings.width, stem=settings.stem, dropout=0.4),
        data=Data(
            source=settings.data,
            image_size=settings.image_size,
            crop_area=settings.crop_area,
            distortion="full",
            shuffle="shards",
        ),
        optimizer=Optimizer(rate=rate, decay_every=max(1, length // DECAYS)),
        training=Schedule(steps=length, batch_size=settings.batch_size, seed=seed),
        evaluation=Evaluations(apart=0.25, first=max(1, length // 40), images=settings.images),
        machine=Machine() if settings.scale == "paper" else Machine(threads=1, device="cpu"),
    )


def variant(
    settings: InceptionSettings, name: str, rate: float, seed: int, without: Collection[int] = ()
) -> Config:
    """A variant of the paper: `name` of the recipe, applied to Inception at `rate`."""
    config, _ = recipe.apply(inception(settings, rate, seed, settings.steps), name, without)
    return cut(config, steps(settings, name))


def cut(config: Config, length: int) -> Config:
    """`config`, trained for `length` steps of its schedule."""
    return config.changed("training", steps=length)


def sweep(settings: ImagenetSettings) -> dict[str, Config]:
    """Inception at each rate, from a seed of its own; none where there is no choice."""
    if len(settings.rates) == 1:
        return {}
    length = min(settings.sweep_steps, settings.steps)
    return {
        _swept(rate): inception(settings, rate, SWEEP_SEED, length).changed(
            "evaluation", first=max(1, length // 2)
        )
        for rate in settings.rates
    }


def best_rate(settings: ImagenetSettings, curves: Curves) -> float | None:
    """The rate at which Inception becomes most accurate; None before the sweep has ended."""
    if len(settings.rates) == 1:
        return settings.rates[0]
    if not all(_swept(rate) in curves and curves[_swept(rate)].result for rate in settings.rates):
        return None
    return max(settings.rates, key=lambda rate: curves[_swept(rate)].best_accuracy)


def swept(settings: ImagenetSettings, curves: Curves) -> dict[float, Curve[Config]]:
    """The curves of the sweep, as far as there are any, by rate."""
    return {rate: curves[_swept(rate)] for rate in settings.rates if _swept(rate) in curves}


def cropped(settings: InceptionSettings) -> str:
    """How much of an image the networks are trained on, in a sentence."""
    low, high = settings.crop_area
    if low == high == 1:
        return "Networks are trained on whole images."
    return f"Training crops cover {percent(low, 0)} to {percent(high, 0)} of an image."


def job(name: str, seed: int) -> str:
    """What the network of a variant and seed is called in the records."""
    return f"{name}-seed{seed}"


def _swept(rate: float) -> str:
    return f"sweep-inception-rate{rate:g}"
