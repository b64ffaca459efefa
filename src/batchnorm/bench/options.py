"""The options of a measurement."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16"]


class Options(BaseModel):
    """The options of all commands; each uses those that apply to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seconds: float = Field(5.0, description="how long the rounds of one row may take")
    least: int = Field(7, description="rounds that a row has in any case")
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    networks: tuple[str, ...] = ()
    size: int = Field(64, description="height and width of the networks' images")
    batch: int = Field(32, description="images in a batch; the MLP has the paper's 60")
    full: bool = Field(False, description="BN alone and with a residual too")
    compile: bool = Field(False, description="let torch.compile take part")
    quick: bool = Field(False, description="tiny shapes: does it run, not how fast")
