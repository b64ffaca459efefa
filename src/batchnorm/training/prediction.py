"""What a trained network says of images it has not seen, in one crop and in 144; resumable as training is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from batchnorm.data.catalogue import load
from batchnorm.data.corrupt import Corrupt
from batchnorm.data.subset import Subset
from batchnorm.records import Evaluation, Result
from batchnorm.training import checkpoint
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.config import Config
from batchnorm.training.evaluation import Crops, Predictions, predict
from batchnorm.training.trainer import Trainer

CROPS: Literal[144] = 144
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

    said: by one crop of each image so far, and by 144.

    Raises: DataError when the validation set cannot be loaded.
    """

    def __init__(self, config: Prediction, job: str, folder: Path) -> None:
        self.config, self.job = config, job
        self.evaluations: list[Evaluation] = []
        self.source = Subset(load(config.config.data.source, "val"), config.images)
        nothing = Predictions(torch.empty(0, self.source.classes), torch.empty(0, dtype=torch.int64))
        self.said: dict[Crops, Predictions] = {1: nothing, CROPS: nothing}
        self._checkpoint = folder / f"{config.network}.pt"

    @property
    def step(self) -> int:
        """How many images have been seen in all their crops."""
        return len(self.said[CROPS])

    def run(self) -> Iterator[Evaluation | Result | None]:
        """Predict; yield None after every few images, and in the end how many were right by 144 crops.

        Raises: CheckpointError when the network has not been trained.
        """
        if self.step < len(self.source):
            network, data = self._network(), self.config.config.data
            for crops in self.said:
                rest = range(len(self.said[crops]), len(self.source))
                corrupt = Corrupt(data.corrupt_share, len(self.source))
                for part in predict(
                    network, self.source, data.image_size, crops=crops, indices=rest, corrupt=corrupt
                ):
                    self.said[crops] = Predictions.joined([self.said[crops], part])
                    yield None
        accuracy = self.said[CROPS].score.accuracy
        if not self.evaluations:
            self.evaluations.append(
                Evaluation(job=self.job, step=self.step, loss=self._loss(), accuracy=accuracy)
            )
            yield self.evaluations[0]
        yield Result(
            job=self.job,
            config=self.config.model_dump(mode="json"),
            steps=self.step,
            diverged=False,
            loss=self._loss(),
            accuracy=accuracy,
            seconds=0.0,
        )

    def _loss(self) -> float:
        """Cross-entropy of the mean over the crops, nats, of the images that could be read."""
        said = self.said[CROPS]
        read = said.labels >= 0
        return float(nn.functional.nll_loss(said.probabilities[read].log(), said.labels[read]))

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
            "probabilities": {crops: said.probabilities for crops, said in self.said.items()},
            "labels": {crops: said.labels for crops, said in self.said.items()},
            "evaluations": [evaluation.model_dump_json() for evaluation in self.evaluations],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises: CheckpointError if that was another prediction."""
        if state.get("config") != self.config.model_dump(mode="json"):
            raise CheckpointError(f"the checkpoint of {self.job} is of another prediction: delete it")
        self.said = _said(state)
        self.evaluations = [Evaluation.model_validate_json(line) for line in state["evaluations"]]


def predicted(path: Path) -> dict[Crops, Predictions]:
    """What an ended prediction says by one crop, and by 144. Raises: CheckpointError."""
    state = checkpoint.load(path)
    if state is None:
        raise CheckpointError(f"there is no {path}")
    return _said(state)


def _said(state: dict[str, Any]) -> dict[Crops, Predictions]:
    labels = state["labels"]
    return {crops: Predictions(of, labels[crops]) for crops, of in state["probabilities"].items()}
