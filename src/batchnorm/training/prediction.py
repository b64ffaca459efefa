"""A trained network's predictions on validation images, by one crop and by 144, as a resumable job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

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
_TRAINING = 3  # cost of a training step in forward passes


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
    """Runs a `Prediction`.

    predictions: those so far, by one crop of each image and by 144.

    Raises: DataError when the validation set cannot be loaded.
    """

    def __init__(self, config: Prediction, job: str, folder: Path) -> None:
        self.config, self.job = config, job
        self.evaluations: list[Evaluation] = []
        self.source = Subset(load(config.config.data.source, "val"), config.images)
        empty = Predictions(torch.empty(0, self.source.classes), torch.empty(0, dtype=torch.int64))
        self.predictions: dict[Crops, Predictions] = {1: empty, CROPS: empty}
        self._checkpoint = folder / f"{config.network}.pt"

    @property
    def step(self) -> int:
        """The number of images predicted by 144 crops."""
        return len(self.predictions[CROPS])

    def run(self) -> Iterator[Evaluation | Result | None]:
        """Predict; yield None after every few images, and at the end the accuracy by 144 crops.

        Raises: CheckpointError when the network has not been trained.
        """
        if self.step < len(self.source):
            network, data = self._network(), self.config.config.data
            for crops in self.predictions:
                rest = range(len(self.predictions[crops]), len(self.source))
                corrupt = Corrupt(data.corrupt_share, len(self.source))
                for part in predict(
                    network, self.source, data.image_size, crops=crops, indices=rest, corrupt=corrupt
                ):
                    self.predictions[crops] = Predictions.concatenate([self.predictions[crops], part])
                    yield None
        accuracy = self.predictions[CROPS].score.accuracy
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
        """Cross-entropy, nats, of the mean probabilities over the crops, over the images that could be read."""
        predictions = self.predictions[CROPS]
        read = predictions.labels >= 0
        return float(nn.functional.nll_loss(predictions.probabilities[read].log(), predictions.labels[read]))

    def _network(self) -> nn.Module:
        state = checkpoint.load(self._checkpoint)
        if state is None:
            raise CheckpointError(f"there is no {self._checkpoint}: train the network first")
        trainer = Trainer(self.config.config, self.config.network)
        trainer.load_state_dict(state)
        return trainer.inference_network()

    def state_dict(self) -> dict[str, Any]:
        """The predictions so far; tensors and plain values."""
        return {
            "config": self.config.model_dump(mode="json"),
            "probabilities": {
                crops: predictions.probabilities for crops, predictions in self.predictions.items()
            },
            "labels": {crops: predictions.labels for crops, predictions in self.predictions.items()},
            "evaluations": [evaluation.model_dump_json() for evaluation in self.evaluations],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from this state. Raises: CheckpointError if it is of another prediction."""
        if state.get("config") != self.config.model_dump(mode="json"):
            raise CheckpointError(f"the checkpoint of {self.job} is of another prediction: delete it")
        self.predictions = _predictions_of(state)
        self.evaluations = [Evaluation.model_validate_json(line) for line in state["evaluations"]]


def load_predictions(path: Path) -> dict[Crops, Predictions]:
    """The predictions in the checkpoint at `path`, by one crop and by 144. Raises: CheckpointError."""
    state = checkpoint.load(path)
    if state is None:
        raise CheckpointError(f"there is no {path}")
    return _predictions_of(state)


def _predictions_of(state: dict[str, Any]) -> dict[Crops, Predictions]:
    """Raises: CheckpointError unless they are probabilities and labels of as many images."""
    rows, labels = state.get("probabilities"), state.get("labels")
    if (
        not isinstance(rows, dict)
        or not isinstance(labels, dict)
        or not {1, CROPS} >= rows.keys() == labels.keys()
    ):
        raise CheckpointError("this is no checkpoint of predictions: delete it")
    for crops, each in rows.items():
        if (
            not isinstance(each, Tensor)
            or not isinstance(labels[crops], Tensor)
            or (each.dim(), each.dtype, labels[crops].dtype) != (2, torch.float32, torch.int64)
            or labels[crops].shape != each.shape[:1]
        ):
            raise CheckpointError("the predictions in this checkpoint are none: delete it")
    return {crops: Predictions(each, labels[crops]) for crops, each in rows.items()}
