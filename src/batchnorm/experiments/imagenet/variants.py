"""The networks of section 4.2.2: Inception at its best rate, and its variants by the recipe."""

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
# The paper trained Inception for 31.0e6 steps. A decay of 4 % every 8 epochs happens 97 times in them and reduces the
# rate to 2 %. A shorter run has the same number of decays.
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
    """The number of training steps of a variant."""
    return settings.steps if variant in _LONG else max(1, settings.steps // SHARE_OF_STEPS)


def inception(settings: InceptionSettings, rate: float, seed: int, length: int) -> Config:
    """Inception without BN and without the changes of section 4.2.1; its rate decays over `length` steps."""
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
    return truncate(config, steps(settings, name))


def truncate(config: Config, length: int) -> Config:
    """`config`, trained for `length` steps of its schedule."""
    return config.with_values("training", steps=length)


def sweep(settings: ImagenetSettings) -> dict[str, Config]:
    """The jobs of the sweep: Inception at each rate, from another seed. Empty if there is only one rate."""
    if len(settings.rates) == 1:
        return {}
    length = min(settings.sweep_steps, settings.steps)
    return {
        _sweep_job(rate): inception(settings, rate, SWEEP_SEED, length).with_values(
            "evaluation", first=max(1, length // 2)
        )
        for rate in settings.rates
    }


def best_rate(settings: ImagenetSettings, curves: Curves) -> float | None:
    """The rate with the highest accuracy of Inception; None before the sweep has ended."""
    if len(settings.rates) == 1:
        return settings.rates[0]
    if not all(_sweep_job(rate) in curves and curves[_sweep_job(rate)].result for rate in settings.rates):
        return None
    return max(settings.rates, key=lambda rate: curves[_sweep_job(rate)].best_accuracy)


def sweep_curves(settings: ImagenetSettings, curves: Curves) -> dict[float, Curve[Config]]:
    """The curves of the sweep so far, by rate."""
    return {rate: curves[_sweep_job(rate)] for rate in settings.rates if _sweep_job(rate) in curves}


def describe_crops(settings: InceptionSettings) -> str:
    """A sentence on the crops of training images."""
    low, high = settings.crop_area
    if low == high == 1:
        return "Networks are trained on whole images."
    return f"Training crops cover {percent(low, 0)} to {percent(high, 0)} of an image."


def job(name: str, seed: int) -> str:
    """The name in the records of the network of a variant and a seed."""
    return f"{name}-seed{seed}"


def _sweep_job(rate: float) -> str:
    return f"sweep-inception-rate{rate:g}"
