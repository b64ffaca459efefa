"""The settings of the ensemble, and their presets for the three scales."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from batchnorm.experiments.imagenet import inception_settings as scales
from batchnorm.experiments.imagenet.inception_settings import InceptionSettings


class EnsembleSettings(InceptionSettings):
    """The settings of the ensemble. Together with the data they determine every number of its run."""

    claims: tuple[str, ...] = ("ensemble",)
    seeds: int = Field(1, ge=1, le=1, description="the six networks have seeds 0 to 5")
    # Thirty times Inception's best rate in the scaled run is too high for training of so few epochs.
    rate: float = Field(
        0.005, gt=0, description="learning rate of Inception; that of the networks is 30 times as high"
    )
    images: int | None = Field(2_000, ge=1, description="validation images, in 144 crops each")


QUICK: dict[str, Any] = {"scale": "quick", "steps": 2_000, "images": 300}
PAPER: dict[str, Any] = scales.PAPER_SCALE | {"rate": scales.PAPER_RATE, "images": None}


def preset(quick: bool, data: str | None) -> dict[str, Any]:
    """The defaults for this scale, which the user's options override."""
    if quick:
        return QUICK
    return PAPER if scales.at_the_papers_scale(data) else {}
