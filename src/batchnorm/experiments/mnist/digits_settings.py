"""The settings of the MNIST experiment."""

from __future__ import annotations

from pydantic import Field

from batchnorm.data.digits import SHIPPED
from batchnorm.experiments.claim import Settings


class DigitsSettings(Settings):
    """The settings. Together with the data they determine every number of the run."""

    data: str = SHIPPED
    steps: int = Field(50_000, ge=1, description="of the longest run; no run is longer")
    rate: float = Field(0.1, gt=0, description="the learning rate that both networks share")
    init_std: float = Field(0.1, gt=0, description="standard deviation of the hidden layers' initial weights")
    claims: tuple[str, ...] = ("figure-1",)
