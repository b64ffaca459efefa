"""The training loop: one network, from a configuration and labelled images to a stream of records.

Everything a step depends on is in `state_dict`, or follows from the configuration and the number of the step, so a run
that was stopped anywhere continues to the same numbers; in one process bit for bit on the same machine. In several
processes (torchrun) each has its part of every mini-batch, and all do the same at the same time.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from batchnorm.data.corrupt import Corrupt
from batchnorm.data.crops import single_crop
from batchnorm.data.distortion import training_transform
from batchnorm.data.loader import Batch, InOrder, Loader
from batchnorm.data.order import Order
from batchnorm.data.source import Source, load
from batchnorm.data.subset import Subset
from batchnorm.memory import keep_memory
from batchnorm.models.inception import Outputs
from batchnorm.passes.convert_sync import convert_sync
from batchnorm.passes.virtual_batch import virtual_batch
from batchnorm.records import Evaluation, Result
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.config import ELSEWHERE, Config
from batchnorm.training.network import NetworkError, build
from batchnorm.training.population import has_norms, inference_copy
from batchnorm.training.schedule import evaluation_steps
from batchnorm.training.score import Score, probabilities

_PRECISIONS = {"float32": "no", "float64": "no", "bfloat16": "bf16", "float16": "fp16"}
_LOOK_EVERY = 50  # steps between two looks at whether the loss is still a number
_MANY_CLASSES = 10  # with more, the share of images whose class is among the five likeliest is recorded too


class Trainer:
    """One network in training.

    config: what to train and how.
    job: the network's name in the records.

    Raises: DataError, NetworkError for what cannot be loaded or built; ValueError for a batch that does not divide.
    """

    def __init__(self, config: Config, job: str) -> None:
        self.config, self.job = config, job
        self.processes = _processes(config)
        rank, ranks = self.processes.process_index, self.processes.num_processes
        training, data = config.training, config.data
        place: Any = {"rank": rank, "ranks": ranks, "processes": config.machine.loaders}
        self.source = load(data.source, "train")
        self.validation_source: Source = load(data.source, "val")
        if config.evaluation.images is not None:
            self.validation_source = Subset(self.validation_source, config.evaluation.images)
        self.corrupt, unreadable = (
            Corrupt(data.corrupt_share, len(source)) for source in (self.source, self.validation_source)
        )
        self.order = Order(
            len(self.source),
            training.batch_size,
            shards=self.source.shards,
            shard_size=data.shard_size,
            shuffle=data.shuffle,
            seed=training.seed,
        )
        transform = training_transform(
            data.image_size, crop_area=data.crop_area, mirror=data.mirror, distortion=data.distortion
        )
        self.loader = Loader(self.source, transform, self.order, corrupt=self.corrupt, **place)
        self.validation = InOrder(
            self.validation_source,
            single_crop(data.image_size),
            config.evaluation.batch_size,
            corrupt=unreadable,
            **place,
        )
        largest_share = math.ceil(len(self.validation_source) / ranks)
        self._rounds = math.ceil(largest_share / config.evaluation.batch_size)
        torch.manual_seed(training.seed + rank)  # dropout; everything else has a generator of its own
        network = build(config, self.source.classes, self.source.channels)
        if training.sync:
            convert_sync(network)
        if training.precision == "float64":
            network = network.double()
        if config.machine.channels_last:
            network = network.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            _decayed(network, config.optimizer.weight_decay),
            lr=config.optimizer.rate,
            momentum=config.optimizer.momentum,
        )
        self.schedule = torch.optim.lr_scheduler.StepLR(
            self.optimizer, config.optimizer.decay_every, config.optimizer.decay
        )
        self.model, self.optimizer = self.processes.prepare(network, self.optimizer)
        self.network = self.processes.unwrap_model(self.model)
        self.average = (
            AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(training.ema))
            if training.ema is not None
            else None
        )
        self.step = 0
        self.loss_sum, self.losses = torch.zeros((), device=self.processes.device), 0
        self.seconds = 0.0
        self.diverged = False
        self.evaluations: list[Evaluation] = []
        self.result: Result | None = None
        self.inference: nn.Module | None = None  # the network that was evaluated last

    def run(self) -> Iterator[Evaluation | Result | None]:
        """Train; yield what is worth recording, and None at every other moment that is good to stop at.

        The yields of all processes are the same in number, so that they can agree on stopping.
        """
        due = set(self._due())
        batches: Iterator[Batch] | None = None
        while True:
            evaluated = self.evaluations[-1].step if self.evaluations else 0
            if evaluated < self.step and (self.step in due or self.diverged):
                yield from self._evaluate()
            if self.step == self.config.training.steps or self.diverged or self._out_of_patience:
                yield from self._end()
                return
            batches = batches or self.loader.batches(itertools.count(self.step))
            started = time.perf_counter()
            self._learn(next(batches))
            self.step += 1
            self.seconds += time.perf_counter() - started
            if self.step % _LOOK_EVERY == 0 or self.step in due:
                self.diverged = not math.isfinite(self._mean_loss())
            yield None

    def _learn(self, batch: Batch) -> None:
        """One step of SGD on this process's part of the mini-batch."""
        images, labels = self._placed(batch)
        self.optimizer.zero_grad()
        micro = self.config.training.micro_batch or len(labels)
        if len(labels) <= micro:
            loss = self._loss(self.model(images), labels)
            self.processes.backward(loss)
        else:
            loss = self._learn_in_parts(images.split(micro), labels.split(micro))
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.loss_sum += loss.detach()
        self.losses += 1

    def _learn_in_parts(self, images: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Tensor:
        """The gradients of one batch from micro-batches, BN's too; past DDP, which would see several passes."""
        total, loss = sum(map(len, labels)), torch.zeros((), device=self.processes.device)
        with virtual_batch(self.network, images):
            for part, its_labels in zip(images, labels, strict=True):
                its_loss = self._loss(self.network(part), its_labels) * (len(its_labels) / total)
                self.processes.backward(its_loss)
                loss += its_loss.detach()
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad = self.processes.reduce(parameter.grad, "mean")
        return loss

    def _loss(self, outputs: Tensor | Outputs, labels: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return nn.functional.cross_entropy(outputs, labels)
        auxiliary = nn.functional.cross_entropy(outputs.auxiliary, labels)
        return (
            nn.functional.cross_entropy(outputs.logits, labels)
            + self.config.training.auxiliary_weight * auxiliary
        )

    def _placed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        layout = torch.channels_last if self.config.machine.channels_last else torch.contiguous_format
        device = self.processes.device
        images = batch.images.double() if self.config.training.precision == "float64" else batch.images
        return images.to(device, memory_format=layout), batch.labels.to(device)

    def _due(self) -> Iterator[int]:
        steps, wanted = self.config.training.steps, self.config.evaluation
        at = (
            range(wanted.every, steps, wanted.every)
            if wanted.every
            else evaluation_steps(steps, wanted.apart)
        )
        yield from (step for step in at if step >= wanted.first)
        yield steps

    def _evaluate(self) -> Iterator[Evaluation | None]:
        """Look at the validation set, by population statistics."""
        self.inference = self.inference_network()
        population = yield from self._score(self.inference)
        average = None
        if self.average is not None:
            average = yield from self._score(self.inference_network(averaged=True))
        evaluation = Evaluation(
            job=self.job,
            step=self.step,
            loss=self._mean_loss(),
            accuracy=population.accuracy,
            accuracy_top5=population.accuracy_top5 if self.source.classes > _MANY_CLASSES else None,
            accuracy_average=average.accuracy if average is not None else None,
        )
        self.loss_sum, self.losses = torch.zeros_like(self.loss_sum), 0
        self.evaluations.append(evaluation)
        yield evaluation

    def inference_network(self, averaged: bool = False) -> nn.Module:
        """A copy for inference by population statistics (Algorithm 2), over training batches from all over an epoch.

        averaged: of the average of the weights instead, whose statistics no training batch has moved.
        """
        network = self.average.module if averaged and self.average is not None else self.network
        epoch, wanted = self.order.batches_per_epoch, self.config.evaluation.population_batches
        steps = range(0, epoch, math.ceil(epoch / wanted))
        return inference_copy(network, self.loader.batches(steps), self._forward)

    def _forward(self, network: nn.Module, batch: Batch) -> None:
        images, _ = self._placed(batch)
        micro = self.config.training.micro_batch or len(images)
        for part in images.split(micro):
            network(part)

    def _score(self, network: nn.Module) -> Generator[None, None, Score]:
        """Of all processes together, each with its share of the validation set."""
        score = Score()
        batches = iter(self.validation)
        for _ in range(self._rounds):
            batch = next(batches, None)  # another process may have one more
            if batch is not None:
                images, labels = self._placed(batch)
                score += Score.of(probabilities(network, images), labels)
            yield None
        counts = torch.tensor([score.images, score.first, score.among_five], device=self.processes.device)
        return Score(*self.processes.reduce(counts).tolist())

    def _mean_loss(self) -> float:
        """Of the steps since the evaluation before, and of all processes."""
        if not self.losses:
            return math.nan
        return float(self.processes.reduce(self.loss_sum / self.losses, "mean"))

    @property
    def sound(self) -> bool:
        """Whether every weight and the loss are still numbers: only then is the state worth keeping."""
        values = (self.loss_sum, *self.network.parameters())
        return all(bool(value.isfinite().all()) for value in values)

    @property
    def _out_of_patience(self) -> bool:
        patience = self.config.training.patience
        accuracies = [evaluation.accuracy for evaluation in self.evaluations]
        return patience is not None and len(accuracies) - 1 - _first_best(accuracies) >= patience

    def _end(self) -> Iterator[Result | None]:
        """The result: the last evaluation, and beside it the accuracy by the moving averages."""
        if self.result is None:
            last, moving = self.evaluations[-1], None
            if has_norms(self.network):
                moving = yield from self._score(copy.deepcopy(self.network).eval())
            self.result = Result(
                job=self.job,
                config=self.config.model_dump(mode="json"),
                steps=self.step,
                diverged=self.diverged,
                loss=last.loss,
                accuracy=last.accuracy,
                accuracy_moving=moving.accuracy if moving is not None else None,
                seconds=round(self.seconds, 2),
            )
        yield self.result

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, and what it has recorded; tensors and plain values.

        To be called by all processes at once.
        """
        return {
            "config": self.config.model_dump(mode="json"),
            "classes": self.source.classes,
            "channels": self.source.channels,
            "step": self.step,
            "model": self.network.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.processes.scaler.state_dict() if self.processes.scaler is not None else None,
            "random": gather_object([torch.get_rng_state()]),
            "loss_sum": self.loss_sum,
            "losses": self.losses,
            "seconds": self.seconds,
            "corrupt": self.corrupt.state_dict(),
            "evaluations": [evaluation.model_dump_json() for evaluation in self.evaluations],
            "result": self.result.model_dump_json() if self.result is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises: CheckpointError if that was another run."""
        if not _same_run(self.config, state.get("config")):
            raise CheckpointError(
                f"the checkpoint of {self.job} was trained with other settings: delete it, or use a new folder"
            )
        self.step, self.losses, self.seconds = state["step"], state["losses"], state["seconds"]
        self.loss_sum = state["loss_sum"].to(self.processes.device)
        self.network.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.processes.scaler is not None:
            self.processes.scaler.load_state_dict(state["scaler"])
        random, rank = state["random"], self.processes.process_index
        if rank < len(random):  # of more processes than there were, the further ones draw anew
            torch.set_rng_state(random[rank])
        self.corrupt.load_state_dict(state["corrupt"])
        self.evaluations = [Evaluation.model_validate_json(line) for line in state["evaluations"]]
        self.result = Result.model_validate_json(state["result"]) if state["result"] else None
        self.diverged = self.result is not None and self.result.diverged


def _processes(config: Config) -> Accelerator:
    """All processes of this run, of which torchrun says how many there are; without it just this one."""
    machine = config.machine
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    cpu = machine.device == "cpu" or not torch.accelerator.is_available()
    if cpu and config.training.precision == "float16":
        raise NetworkError('[training] precision = "float16" is for accelerators: on a CPU take "bfloat16"')
    # told that it is a CPU, Accelerate joins the processes by gloo; left to find out, it would not join them
    processes = Accelerator(cpu=cpu, mixed_precision=_PRECISIONS[config.training.precision])
    if processes.device.type == "cpu" and machine.keep_memory:
        keep_memory()
    return processes


def _decayed(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: L2 on the weights of convolutions and linear layers, none on biases, γ and β."""
    weights = [
        module.weight
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]
    chosen = set(map(id, weights))
    others = [parameter for parameter in network.parameters() if id(parameter) not in chosen]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _same_run(config: Config, stored: object) -> bool:
    """Whether `stored`, perhaps of an earlier version that knew fewer keys, trains as `config` does."""
    try:
        theirs = Config.model_validate(stored)
    except ValidationError:
        return False
    return theirs.model_dump(exclude=ELSEWHERE) == config.model_dump(exclude=ELSEWHERE)


def _first_best(accuracies: list[float]) -> int:
    """The place of the highest accuracy; of several the first."""
    return accuracies.index(max(accuracies)) if accuracies else 0
