"""The settings of the MNIST experiment."""

from __future__ import annotations

from pydantic import Field

from batchnorm.data.data_sets import SHIPPED
from batchnorm.experiments.claim import CLAIMS, Settings


class DigitsSettings(Settings):
    """The settings. Together with the data they determine every number of the run."""

    data: str = Field(
        SHIPPED,
        description="one of mnist-10k (the digits in this package), mnist and fashion-mnist, or a folder of IDX "
        "files, gzipped or not",
    )
    steps: int = Field(50_000, ge=1, description="steps of the longest run")
    rate: float = Field(0.1, gt=0, description="the learning rate that both networks of figure 1 share")
    init_std: float = Field(
        0.1,
        gt=0,
        description="standard deviation of the hidden layers' initial weights (not for the claims that vary it)",
    )
    claims: tuple[str, ...] = Field(("figure-1",), description=CLAIMS)
