"""The settings of the ImageNet experiments, and their presets for the three scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from batchnorm.data.data_sets import NAMES
from batchnorm.experiments.claim import CLAIMS, Settings


class InceptionSettings(Settings):
    """The settings of every experiment with Inception. The defaults are those of the scaled run."""

    data: str = Field(
        "fashion-mnist",
        description="a name (fashion-mnist, mnist, cifar-10, mnist-10k) for the scaled run; or a folder in ImageNet's "
        "layout or with WebDataset shards, for the paper's",
    )
    scale: Literal["scaled", "quick", "paper"] = "scaled"
    steps: int = Field(
        8_000, ge=50, description="of Inception and BN-Baseline; the others take a fifth of it"
    )
    width: float = Field(0.25, gt=0, description="multiplies every number of channels")
    image_size: int = Field(28, ge=8)
    stem: Literal["imagenet", "small"] = "small"
    # Whole images: within a few epochs there is nothing to regularise, and crops slow all networks down.
    crop_area: tuple[float, float] = (1.0, 1.0)
    batch_size: int = Field(32, ge=2)
    images: int | None = Field(None, ge=1, description="of the validation set; unless given, all")


class ImagenetSettings(InceptionSettings):
    """The settings of figure 3 and its claims. Together with the data they determine every number of the run."""

    claims: tuple[str, ...] = Field(("failures", "figure-3"), description=CLAIMS)
    rates: tuple[float, ...] = Field(
        (0.01, 0.02, 0.04, 0.08), min_length=1, description="learning rates to try for Inception"
    )
    sweep_steps: int = Field(2_000, ge=50, description="training steps for each of the rates")


# A quick version of the same claims: ten minutes on two cores.
QUICK: dict[str, Any] = {
    "scale": "quick",
    "steps": 1_600,
    "seeds": 1,
    "rates": (0.02,),
    "images": 2_000,
}
# The paper's scale, for a cluster. The paper gives the rate; what it leaves open is as in GoogLeNet.
PAPER_RATE = 0.0015
PAPER_SCALE: dict[str, Any] = {
    "scale": "paper",
    "steps": 31_000_000,
    "seeds": 1,
    "width": 1.0,
    "image_size": 224,
    "stem": "imagenet",
    "crop_area": (0.08, 1.0),
}
PAPER: dict[str, Any] = PAPER_SCALE | {"rates": (PAPER_RATE,)}


def preset(quick: bool, data: str | None) -> dict[str, Any]:
    """The defaults for this scale, which the user's options override; a folder of images or shards means ImageNet's."""
    if quick:
        return QUICK
    return PAPER if at_the_papers_scale(data) else {}


def at_the_papers_scale(data: str | None) -> bool:
    """Whether `data` is a folder of images or shards, and not one of the named data sets or of IDX files."""
    return not (data is None or data in NAMES or any(Path(data).expanduser().glob("*-ubyte*")))
