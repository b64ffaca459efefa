"""What decides a training run: with the data, these values give the same numbers every time."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from batchnorm.models.mlp import Nonlinearity


class Training(BaseModel):
    """One network and how it is trained: plain SGD on cross-entropy, no momentum, no weight decay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_norm: bool
    rate: float = Field(gt=0, description="learning rate of SGD")
    steps: int = Field(ge=1)
    seed: int = Field(ge=0, description="of the initial weights, the order of the samples and dropout")
    init_std: float = Field(
        0.1, gt=0, description="standard deviation of the hidden layers' Gaussian initial weights"
    )
    output_std: float = Field(0.1, gt=0, description="the same for the output layer")
    nonlinearity: Nonlinearity = "sigmoid"
    hidden: tuple[int, ...] = (100, 100, 100)
    dropout: float = Field(0.0, ge=0, lt=1)
    batch_size: int = Field(60, ge=2)
    watch: bool = Field(False, description="record what the last hidden layer's nonlinearities see")

    @property
    def cost(self) -> int:
        """How long it takes, in steps without BN; a step with BN takes about two of them."""
        return self.steps * (2 if self.batch_norm else 1)
