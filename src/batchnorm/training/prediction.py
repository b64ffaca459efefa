"""What a trained network says of images it has not seen, in one crop and in 144; resumable as training is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from batchnorm.data.corrupt import Corrupt
from batchnorm.data.crops import multi_crop, single_crop
from batchnorm.data.loader import InOrder
from batchnorm.data.source import load
from batchnorm.data.subset import Subset
from batchnorm.records import Evaluation, Result
from batchnorm.training import checkpoint
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.config import Config
from batchnorm.training.score import Score, probabilities
from batchnorm.training.trainer import Trainer

CROPS = 144
_AT_A_TIME = 2  # images, each in 145 crops
_TRAINING = 3  # times what a forward pass costs


class Prediction(BaseModel):
    """A job: the probabilities that the trained network of another job gives to validation images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = Field(description="the job that trained it")
    config: Config = Field(description="of that job")
    images: int = Field(ge=1, description="of the validation set, chosen once at random")

    @property
    def steps(self) -> int:
        """How many images there are."""
        return self.images

    @property
    def cost(self) -> float:
        """In training steps."""
        return self.images * (CROPS + 1) / self.config.training.batch_size / _TRAINING


class Predictor:
    """A prediction in progress.

    single, multi: (images so far, classes) probabilities by the central crop, and the mean over 144 crops.
    labels: (images so far,) their classes.

    Raises: CheckpointError when the network has not been trained.
    """

    def __init__(self, config: Prediction, job: str, folder: Path) -> None:
        self.config, self.job, self.step = config, job, 0
        self.evaluations: list[Evaluation] = []
        size = config.config.data.image_size
        one, many = single_crop(size), multi_crop(size)
        validation = Subset(load(config.config.data.source, "val"), config.images)
        self._batches = InOrder(
            validation,
            lambda image: torch.cat([one(image)[None], many(image)]),
            _AT_A_TIME,
            corrupt=Corrupt(config.config.data.corrupt_share, len(validation)),
        )
        self._checkpoint = folder / f"{config.network}.pt"
        self.single, self.multi = (torch.empty(0, validation.classes) for _ in range(2))
        self.labels = torch.empty(0, dtype=torch.int64)

    def run(self) -> Iterator[Evaluation | Result | None]:
        """Predict; yield None after every few images, and in the end how many were right by 144 crops."""
        network: nn.Module | None = None
        for number, (images, labels) in enumerate(self._batches):
            if number * _AT_A_TIME < self.step:
                continue
            network = network or self._network()
            self.single = torch.cat([self.single, probabilities(network, images[:, 0])])
            self.multi = torch.cat([self.multi, probabilities(network, images[:, 1:])])
            self.labels = torch.cat([self.labels, labels])
            self.step = (number + 1) * _AT_A_TIME
            yield None
        accuracy = Score.of(self.multi, self.labels).accuracy
        loss = float(nn.functional.nll_loss(self.multi.log(), self.labels))
        if not self.evaluations:
            evaluation = Evaluation(job=self.job, step=self.config.images, loss=loss, accuracy=accuracy)
            self.evaluations.append(evaluation)
            yield evaluation
        yield Result(
            job=self.job,
            config=self.config.model_dump(mode="json"),
            steps=self.config.images,
            diverged=False,
            loss=loss,
            accuracy=accuracy,
            seconds=0.0,
        )

    def _network(self) -> nn.Module:
        state = checkpoint.load(self._checkpoint)
        if state is None:
            raise CheckpointError(f"there is no {self._checkpoint}: the network is to be trained first")
        trainer = Trainer(self.config.config, self.config.network)
        trainer.load_state_dict(state)
        return trainer.inference_network()

    def state_dict(self) -> dict[str, Any]:
        """What is predicted so far."""
        return {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "single": self.single,
            "multi": self.multi,
            "labels": self.labels,
            "evaluations": [evaluation.model_dump_json() for evaluation in self.evaluations],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises: CheckpointError if that was another prediction."""
        if state.get("config") != self.config.model_dump(mode="json"):
            raise CheckpointError(f"the checkpoint of {self.job} is of another prediction: delete it")
        self.step = state["step"]
        self.single, self.multi, self.labels = state["single"], state["multi"], state["labels"]
        self.evaluations = [Evaluation.model_validate_json(line) for line in state["evaluations"]]


def predicted(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Of an ended prediction: (N, classes) by one crop, (N, classes) by 144, and the classes, (N,)."""
    state = checkpoint.load(path)
    if state is None:
        raise CheckpointError(f"there is no {path}")
    return state["single"], state["multi"], state["labels"]
