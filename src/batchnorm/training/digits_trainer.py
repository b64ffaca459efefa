"""The training loop of the MNIST experiment: from a configuration and the digits to a stream of records.

Everything a step depends on is in `state_dict` or follows from the configuration and the step number, so a
resumed run gives the same numbers as an uninterrupted one, bit for bit on the same machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from batchnorm.data.digits import Digits
from batchnorm.models.mlp import MLP, Nonlinearity
from batchnorm.passes.estimate import inference_copy
from batchnorm.records import Evaluation, Result
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.optimizer import MOMENTS
from batchnorm.training.schedule import Due, evaluation_steps
from batchnorm.training.state import (
    check_form,
    check_optimizer,
    check_progress,
    check_random,
    check_records,
    refused,
)

# The number of training batches over which Algorithm 2 averages: 1,200 samples.
POPULATION_BATCHES = 20
_PERCENTILES = torch.tensor([0.15, 0.50, 0.85])


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
    watch: bool = Field(False, description="record percentiles of the inputs to the last hidden nonlinearity")

    @property
    def cost(self) -> float:
        """The expected duration in steps without BN; a step with BN takes about twice as long."""
        return self.steps * (2 if self.batch_norm else 1)


class DigitsTrainer:
    """One network in training.

    config: the network and its training.
    data: the digits; images are made binary, 1 where a pixel is above half (the paper's "binary image").
    job: the network's name in the records.
    """

    def __init__(self, config: Training, data: Digits, job: str) -> None:
        self.config, self.job = config, job
        self.images, self.labels = _binarize(data.train_images), data.train_labels.long()
        self.test_images, self.test_labels = _binarize(data.test_images), data.test_labels.long()
        data.expect_batch(config.batch_size)
        torch.manual_seed(config.seed)  # for dropout; everything else has its own generator
        self.model = MLP(
            self.images.size(1),
            config.hidden,
            classes=int(max(self.labels.max(), self.test_labels.max(), torch.tensor(9))) + 1,
            batch_norm=config.batch_norm,
            nonlinearity=config.nonlinearity,
            init_std=config.init_std,
            output_std=config.output_std,
            dropout=config.dropout,
            generator=torch.Generator().manual_seed(config.seed),
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.rate)
        self.step = 0
        self.loss_sum, self.loss_count = torch.zeros(()), 0
        self.seconds = 0.0
        self.evaluations: list[Evaluation] = []
        self.watched: list[Tensor] = []  # (3, units) percentiles of each evaluation
        self._epoch, self._order = -1, torch.empty(0)
        # random full batches, as the files may be sorted by class; the same at every evaluation
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))
        full = order[: len(order) // config.batch_size * config.batch_size]
        self._population = full.split(config.batch_size)[:POPULATION_BATCHES]

    def run(self) -> Iterator[Evaluation | Result | None]:
        """Train; yield each record, and None after every other step, where the run may be stopped."""
        due = Due(evaluation_steps(self.config.steps))
        while self.step < self.config.steps and not self._diverged:
            started = time.perf_counter()
            images, labels = self._batch()
            loss = nn.functional.cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.loss_sum += loss.detach()
            self.loss_count += 1
            self.step += 1
            self.seconds += time.perf_counter() - started
            yield self._evaluate() if self.step in due else None
        yield self._result()

    def _batch(self) -> tuple[Tensor, Tensor]:
        """The batch of this step. Each epoch is shuffled; an incomplete last batch is dropped."""
        size = self.config.batch_size
        epoch, batch_index = divmod(self.step, len(self.images) // size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.images), generator=generator)
        chosen = self._order[batch_index * size : (batch_index + 1) * size]
        return self.images.index_select(0, chosen), self.labels.index_select(0, chosen)

    def _evaluate(self) -> Evaluation:
        inference = self._inference_model()
        watched: list[Tensor] = []
        if self.config.watch:
            inference.last_nonlinearity.register_forward_pre_hook(lambda _, inputs: watched.append(inputs[0]))
        accuracy = _accuracy(inference, self.test_images, self.test_labels)
        percentiles = None
        if watched:
            self.watched.append(torch.quantile(watched[0], _PERCENTILES, dim=0))
            low, median, high = self.watched[-1][:, 0].tolist()
            percentiles = (low, median, high)
        evaluation = Evaluation(
            job=self.job,
            step=self.step,
            loss=(self.loss_sum / self.loss_count).item(),
            accuracy=accuracy,
            accuracy_moving=self._accuracy_moving(),
            percentiles=percentiles,
            travel=_travel(self.watched),
        )
        self.loss_sum, self.loss_count = torch.zeros(()), 0
        self.evaluations.append(evaluation)
        return evaluation

    def _result(self) -> Result:
        last = self.evaluations[-1]
        return Result(
            job=self.job,
            config=self.config.model_dump(mode="json"),
            steps=self.step,
            diverged=self._diverged,
            loss=last.loss,
            accuracy=last.accuracy,
            accuracy_moving=last.accuracy_moving,
            train_accuracy=_accuracy(self._inference_model(), self.images, self.labels),
            seconds=round(self.seconds, 2),
        )

    def _inference_model(self) -> MLP:
        """A copy in evaluation mode with the population statistics of Algorithm 2, lines 8-11."""
        return inference_copy(
            self.model, (self.images.index_select(0, chosen) for chosen in self._population)
        )

    def _accuracy_moving(self) -> float | None:
        if not self.config.batch_norm:
            return None
        self.model.eval()
        accuracy = _accuracy(self.model, self.test_images, self.test_labels)
        self.model.train()
        return accuracy

    @property
    def _diverged(self) -> bool:
        return bool(self.evaluations) and not math.isfinite(self.evaluations[-1].loss)

    def state_dict(self) -> dict[str, Any]:
        """The state of the run and its records; tensors and plain values."""
        return {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "loss_sum": self.loss_sum,
            "losses": self.loss_count,
            "seconds": self.seconds,
            "evaluations": [evaluation.model_dump_json() for evaluation in self.evaluations],
            "watched": self.watched,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`. Raises: CheckpointError if it is of a run with other settings."""
        if state.get("config") != self.config.model_dump(mode="json"):
            raise CheckpointError(
                f"the checkpoint of {self.job} was trained with other settings: delete it, or use a new folder"
            )
        with refused(self.job):
            self._check(state)
        self.step, self.loss_sum, self.loss_count = state["step"], state["loss_sum"], state["losses"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.seconds, self.watched = state["seconds"], state["watched"]
        self.evaluations = [Evaluation.model_validate_json(line) for line in state["evaluations"]]

    def _check(self, state: dict[str, Any]) -> None:
        """Raise StateError unless `state` can be that of this trainer at some step."""
        own = self.state_dict()
        step = check_progress(state, own, self.config.steps)
        check_form(state["model"], own["model"], "model")
        check_form(state["loss_sum"], own["loss_sum"], "loss_sum")
        check_optimizer(state["optimizer"], self.optimizer, self.config.rate, step, MOMENTS["SGD"])
        check_random([state["random"]], [own["random"]], "random")
        check_records(state["evaluations"], None, self.job, step)
        watched = len(state["evaluations"]) if self.config.watch else 0
        check_form(state["watched"], [torch.empty(3, self.config.hidden[-1])] * watched, "watched")


def _binarize(images: Tensor) -> Tensor:
    return (images > 127).flatten(1).float()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return int((model(images).argmax(1) == labels).sum()) / len(labels)


def _travel(watched: list[Tensor]) -> float | None:
    """See `Evaluation.travel`."""
    if not watched:
        return None
    low, median, high = torch.stack(watched).unbind(1)  # each (evaluations, units)
    path = median.diff(dim=0).abs().sum(0)
    return (path / (high - low).mean(0)).mean().item()


def digits_trainer(source: str, config: Training, job: str, folder: Path) -> DigitsTrainer:
    """The trainer of a job in a worker; each process loads the data set `source` once."""
    return DigitsTrainer(config, _load_digits(source), job)


@cache
def _load_digits(source: str) -> Digits:
    return Digits.load(source)
