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

from batchnorm.calibrate.inference_copy import average_over_processes, has_norms, inference_copy
from batchnorm.calibrate.over_processes import mean_over_processes
from batchnorm.data.catalogue import load
from batchnorm.data.corrupt import Corrupt
from batchnorm.data.crops import single_crop
from batchnorm.data.distortion import training_transform
from batchnorm.data.idx import DataError
from batchnorm.data.loader import Batch, InOrder, Loader
from batchnorm.data.order import Order
from batchnorm.data.source import Source
from batchnorm.data.subset import Subset
from batchnorm.memory import keep_memory
from batchnorm.passes.convert_sync import convert_sync
from batchnorm.passes.virtual_batch import virtual_batch
from batchnorm.records import Evaluation, Result
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.config import ELSEWHERE, Config
from batchnorm.training.network import NetworkError, build
from batchnorm.training.schedule import evaluation_steps
from batchnorm.training.score import Score, probabilities
from batchnorm.training.toml import ConfigError

_PRECISIONS = {"float32": "no", "float64": "no", "bfloat16": "bf16", "float16": "fp16"}
_LOOK_EVERY = 50  # steps between two looks at whether the loss is still a number
_MANY_CLASSES = 10  # with more, the share of images whose class is among the five likeliest is recorded too


class Trainer:
    """One network in training.

    config: what to train and how.
    job: the network's name in the records.

    Raises: DataError, NetworkError, ConfigError for what cannot be loaded, built or shared among the processes.
    """

    def __init__(self, config: Config, job: str) -> None:
        self.config, self.job = config, job
        self.processes = _processes(config)
        rank, ranks = self.processes.process_index, self.processes.num_processes
        training, data = config.training, config.data
        place: Any = {"rank": rank, "ranks": ranks, "processes": config.machine.loaders}
        with self.processes.local_main_process_first():  # which downloads, where anything is to be
            self.source = load(data.source, "train")
            self.validation_source: Source = load(data.source, "val")
        if config.evaluation.images is not None:
            self.validation_source = Subset(self.validation_source, config.evaluation.images)
        self.corrupt = {
            split: Corrupt(data.corrupt_share, len(source))
            for split, source in (("train", self.source), ("val", self.validation_source))
        }
        self.order = Order(
            len(self.source),
            training.batch_size,
            shards=self.source.shards,
            shard_size=data.shard_size,
            shuffle=data.shuffle,
            seed=training.seed,
        )
        try:
            self.order.share(ranks)
        except ValueError as error:
            raise ConfigError(f"training.batch_size: {error}") from None
        transform = training_transform(
            data.image_size, crop_area=data.crop_area, mirror=data.mirror, distortion=data.distortion
        )
        self.loader = Loader(self.source, transform, self.order, corrupt=self.corrupt["train"], **place)
        self.validation = InOrder(
            self.validation_source,
            single_crop(data.image_size),
            config.evaluation.batch_size,
            corrupt=self.corrupt["val"],
            **place,
        )
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
        # the networks that were evaluated last: as trained, and the average of the weights
        self.inference: nn.Module | None = None
        self.average_inference: nn.Module | None = None

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
        self.loss_sum = self.loss_sum + loss.detach()  # float64 where the loss is
        self.losses += 1

    def _learn_in_parts(self, images: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Tensor:
        """The gradients of one batch from micro-batches, BN's too; past DDP, which would see several passes."""
        total, loss = sum(map(len, labels)), torch.zeros((), device=self.processes.device)
        # on an accelerator activations wait in the CPU's memory: there it is what micro-batches are for
        offload = self.processes.device.type != "cpu"
        with virtual_batch(self.network, images, offload=offload):
            for part, its_labels in zip(images, labels, strict=True):
                its_loss = self._loss(self.network(part), its_labels) * (len(its_labels) / total)
                self.processes.backward(its_loss)
                loss = loss + its_loss.detach()
        if self.processes.num_processes > 1:
            gradients = [each.grad for each in self.network.parameters() if each.grad is not None]
            mean_over_processes(gradients, gradients[0].dtype)
        return loss

    def _loss(self, outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        # several are an auxiliary head's too: our `Outputs`, or torchvision's
        first, *auxiliary = [outputs] if isinstance(outputs, Tensor) else outputs
        loss = nn.functional.cross_entropy(first, labels)
        for logits in auxiliary:
            loss = loss + self.config.training.auxiliary_weight * nn.functional.cross_entropy(logits, labels)
        return loss

    def _placed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        layout = torch.channels_last if self.config.machine.channels_last else torch.contiguous_format
        device = self.processes.device
        images = batch.images.double() if self.config.training.precision == "float64" else batch.images
        return images.to(device, memory_format=layout), batch.labels.to(device)

    def _due(self) -> Iterator[int]:
        steps, wanted = self.config.training.steps, self.config.evaluation
        every = wanted.every or self.order.batches_per_epoch
        at = evaluation_steps(steps, wanted.apart) if wanted.apart else range(every, steps, every)
        yield from (step for step in at if step >= wanted.first)
        yield steps

    def _evaluate(self) -> Iterator[Evaluation | None]:
        """Look at the validation set, by population statistics."""
        self.inference = self.inference_network()
        population = yield from self._score(self.inference)
        average = None
        if self.average is not None:
            self.average_inference = self.inference_network(averaged=True)
            average = yield from self._score(self.average_inference)
        self._share_corrupt()
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
        epoch = self.order.batches_per_epoch
        batches = min(self.config.evaluation.population_batches, epoch)
        steps = [number * epoch // batches for number in range(batches)]
        return inference_copy(network, self.loader.batches(steps), self._forward)

    def _forward(self, network: nn.Module, batch: Batch) -> None:
        network(self._placed(batch)[0])  # micro-batches or not, the batch is whole: its statistics are meant

    def _score(self, network: nn.Module) -> Generator[None, None, Score]:
        """Of all processes together, each with its share of the validation set."""
        score = Score()
        batches = iter(self.validation)
        for _ in range(self.validation.rounds):
            batch = next(batches, None)  # another process may have one more
            if batch is not None:
                images, labels = self._placed(batch)
                score += Score.of(probabilities(network, images), labels)
            yield None
        counts = torch.tensor([score.images, score.first, score.among_five], device=self.processes.device)
        whole = Score(*self.processes.reduce(counts).tolist())
        if not whole.images:
            raise DataError(f"none of the validation images can be read: {self.corrupt['val']}")
        return whole

    def _share_corrupt(self) -> None:
        """Let all processes know what each could not read; too many are too many for all of them."""
        for corrupt in self.corrupt.values():
            for found in gather_object([corrupt.found]):
                corrupt.add(found)

    def _mean_loss(self) -> float:
        """Of the steps since the evaluation before, and of all processes."""
        if not self.losses:
            return math.nan
        return float(self.processes.reduce(self.loss_sum / self.losses, "mean"))

    @property
    def sound(self) -> bool:
        """Whether every weight and the loss are still numbers: only then is the state worth keeping."""
        values = (self.loss_sum, *self.network.parameters())
        return not self.diverged and all(bool(value.isfinite().all()) for value in values)

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
                network = copy.deepcopy(self.network).eval()
                average_over_processes(network)
                moving = yield from self._score(network)
            self.result = Result(
                job=self.job,
                config=self.config.model_dump(mode="json"),
                steps=self.step,
                diverged=self.diverged,
                loss=last.loss,
                accuracy=last.accuracy,
                accuracy_moving=moving.accuracy if moving is not None else None,
                unreadable=sum(map(len, self.corrupt.values())),
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
            "random": gather_object([self._random_states()]),
            "loss_sum": self.processes.reduce(self.loss_sum, "mean"),
            "losses": self.losses,
            "seconds": self.seconds,
            "corrupt": {split: corrupt.state_dict() for split, corrupt in self.corrupt.items()},
            "diverged": self.diverged,
            "evaluations": [evaluation.model_dump_json() for evaluation in self.evaluations],
            "result": self.result.model_dump_json() if self.result is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises: CheckpointError if that was another run, or none."""
        if not _same_run(self.config, state.get("config")):
            raise CheckpointError(
                f"the checkpoint of {self.job} was trained with other settings: delete it, or use a new folder"
            )
        try:
            self._restore(state)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError):
            raise CheckpointError(
                f"the checkpoint of {self.job} does not fit the network: delete it, or use a new folder"
            ) from None

    def _restore(self, state: dict[str, Any]) -> None:
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
            self._set_random_states(random[rank])
        for split, corrupt in self.corrupt.items():
            corrupt.load_state_dict(state["corrupt"][split])
        self.evaluations = [Evaluation.model_validate_json(line) for line in state["evaluations"]]
        self.result = Result.model_validate_json(state["result"]) if state["result"] else None
        self.diverged = state["diverged"]

    def _random_states(self) -> list[Tensor]:
        """Of this process's generators: the CPU's and, where there is one, the accelerator's."""
        device = self.processes.device
        of_device = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
        return [torch.get_rng_state(), *of_device]

    def _set_random_states(self, states: list[Tensor]) -> None:
        device = self.processes.device
        torch.set_rng_state(states[0])
        if device.type != "cpu" and len(states) > 1:
            torch.get_device_module(device).set_rng_state(states[1], device)


def _processes(config: Config) -> Accelerator:
    """All processes of this run, of which torchrun says how many there are; without it just this one."""
    machine = config.machine
    cpu = machine.device == "cpu" or not torch.accelerator.is_available()
    if cpu and config.training.precision == "float16":
        raise NetworkError('[training] precision = "float16" is for accelerators: on a CPU take "bfloat16"')
    # told that it is a CPU, Accelerate joins the processes by gloo; left to find out, it would not join them
    processes = Accelerator(cpu=cpu, mixed_precision=_PRECISIONS[config.training.precision])
    if machine.threads is not None:  # here, because of several processes Accelerate sets a number of its own
        torch.set_num_threads(machine.threads)
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
