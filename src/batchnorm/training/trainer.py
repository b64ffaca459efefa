"""The training loop: one network, from a configuration and labelled images to a stream of records.

Everything a step depends on is in `state_dict` or follows from the configuration and the step number, so a resumed run
gives the same numbers as an uninterrupted one; in one process bit for bit on the same machine. With several processes
(torchrun) each computes its part of every mini-batch.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from batchnorm.calibrate.over_processes import mean_over_processes
from batchnorm.calibrate.states import reduce_statistics
from batchnorm.data.catalogue import load
from batchnorm.data.corrupt import Corrupt
from batchnorm.data.crops import single_crop
from batchnorm.data.distortion import training_transform
from batchnorm.data.idx import DataError
from batchnorm.data.loader import Batch, Loader, SequentialLoader
from batchnorm.data.order import Order
from batchnorm.data.source import Source
from batchnorm.data.subset import Subset
from batchnorm.graph.modules import keeps_statistics
from batchnorm.memory import keep_memory
from batchnorm.passes.convert_sync import convert_sync
from batchnorm.passes.estimate import inference_copy
from batchnorm.passes.save_memory import save_memory
from batchnorm.passes.virtual_batch import virtual_batch
from batchnorm.records import Evaluation, Result
from batchnorm.training import weights
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.config import Config
from batchnorm.training.network import NetworkError, build
from batchnorm.training.optimizer import MOMENTS, factor, optimizer, schedule
from batchnorm.training.schedule import Due, evaluation_steps
from batchnorm.training.score import Score, probabilities
from batchnorm.training.state import (
    StateError,
    check_form,
    check_number,
    check_optimizer,
    check_progress,
    check_random,
    check_records,
    refused,
)
from batchnorm.training.toml import ConfigError, differences

_PRECISIONS = {"float32": "no", "float64": "no", "bfloat16": "bf16", "float16": "fp16"}
_CHECK_LOSS_EVERY = 50  # steps between two checks that the loss is finite
_TOP5_ABOVE_CLASSES = 10  # with more classes, top-5 accuracy is recorded too
_NAMED = 20  # unreadable images in the records


class Check(NamedTuple):
    """The training loss after `step` steps, looked at every 50.

    mean: over the steps since the last evaluation.
    recent: over the steps since the previous check, or that evaluation.
    rate: of the next step.
    seconds: spent in training steps so far.
    """

    step: int
    mean: float
    recent: float
    rate: float
    seconds: float


class Trainer:
    """One network in training.

    config: what to train and how.
    job: the network's name in the records.

    Raises: DataError for data that cannot be loaded; NetworkError for a network that cannot be built; ConfigError for
        a batch that does not divide among the processes.
    """

    def __init__(self, config: Config, job: str) -> None:
        self.config, self.job = config, job
        self.accelerator = _accelerator(config)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        training, data = config.training, config.data
        sharding: Any = {"rank": rank, "ranks": ranks, "processes": config.machine.loaders}
        self.source, self.validation_source = _sources(self.accelerator, data.source)
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
        self.loader = Loader(self.source, transform, self.order, corrupt=self.corrupt["train"], **sharding)
        self.validation = SequentialLoader(
            self.validation_source,
            single_crop(data.image_size),
            config.evaluation.batch_size,
            corrupt=self.corrupt["val"],
            **sharding,
        )
        torch.manual_seed(training.seed + rank)  # for dropout; everything else has its own generator
        network = build(config, self.source.classes, self.source.channels)
        if training.sync:
            convert_sync(network)
        if training.precision == "float64":
            network = network.double()
        if config.machine.channels_last:
            network = network.to(memory_format=torch.channels_last)
        if config.machine.save_memory:
            save_memory(network)
        self.optimizer = optimizer(network, config.optimizer)
        self.schedule = schedule(self.optimizer, config.optimizer, training.steps)
        self.model, self.optimizer = self.accelerator.prepare(network, self.optimizer)
        self.network = self.accelerator.unwrap_model(self.model)
        self.average = (
            AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(training.ema))
            if training.ema is not None
            else None
        )
        self.step = 0
        self.loss_sum, self.loss_count = torch.zeros((), device=self.accelerator.device), 0
        self.seconds = 0.0
        self.diverged = False
        self.evaluations: list[Evaluation] = []
        self.result: Result | None = None
        self.checked: Check | None = None
        self._checked_losses = 0.0, 0  # their sum and number, since the last evaluation
        # the networks of the last evaluation: the trained weights, and their exponential moving average
        self.inference: nn.Module | None = None
        self.average_inference: nn.Module | None = None

    def load_weights(self) -> list[str]:
        """Start from the file `model.weights`, if there is one; return what keeps its initial weights.

        Raises: NetworkError for a file that is broken or of another network.
        """
        if self.config.model.weights is None:
            return []
        path = Path(self.config.model.weights).expanduser()
        new = weights.load(self.network, path, self.source.classes)
        if self.average is not None:
            self.average.module.load_state_dict(self.network.state_dict())
        return new

    def try_step(self) -> float:
        """The loss of the first mini-batch, after one step on it, as a trial: the trainer is of no use afterwards."""
        self._train_step(next(iter(self.loader.batches([0]))))
        return self._mean_loss()

    def run(self) -> Iterator[Evaluation | Result | None]:
        """Train; yield each record, and None after every other step or batch, where the run may be stopped.

        All processes yield equally often, so that they can agree on stopping.
        """
        due = Due(self._evaluation_steps())
        batches: Iterator[Batch] | None = None
        while True:
            evaluated = self.evaluations[-1].step if self.evaluations else 0
            if evaluated < self.step and (self.step in due or self.diverged):
                yield from self._evaluate()
            if self.step == self.config.training.steps or self.diverged or self._out_of_patience:
                yield from self._final_result()
                return
            batches = batches or self.loader.batches(itertools.count(self.step))
            started = time.perf_counter()
            self._train_step(next(batches))
            self.step += 1
            self.seconds += time.perf_counter() - started
            if self.step % _CHECK_LOSS_EVERY == 0 or self.step in due:
                self.checked = self._check()
                self.diverged = not math.isfinite(self.checked.mean)
            yield None

    def _train_step(self, batch: Batch) -> None:
        """One SGD step on this process's part of the mini-batch."""
        images, labels = self._to_device(batch)
        self.optimizer.zero_grad()
        micro_batch = self.config.training.micro_batch or len(labels)
        if len(labels) <= micro_batch:
            loss = self._loss(self.model(images), labels)
            self.accelerator.backward(loss)
        else:
            loss = self._train_step_in_micro_batches(images.split(micro_batch), labels.split(micro_batch))
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.loss_sum = self.loss_sum + loss.detach()  # not in place: the sum takes the dtype of the loss
        self.loss_count += 1

    def _train_step_in_micro_batches(self, images: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Tensor:
        """The gradients of the whole batch by micro-batches; bypasses DDP, which expects one backward pass."""
        total, loss = sum(map(len, labels)), torch.zeros((), device=self.accelerator.device)
        # on an accelerator activations are kept in the CPU's memory, which is the purpose of micro-batches there
        offload = self.accelerator.device.type != "cpu"
        with virtual_batch(self.network, images, offload=offload):
            for part, part_labels in zip(images, labels, strict=True):
                part_loss = self._loss(self.network(part), part_labels) * (len(part_labels) / total)
                self.accelerator.backward(part_loss)
                loss = loss + part_loss.detach()
        if self.accelerator.num_processes > 1:
            gradients = [
                parameter.grad for parameter in self.network.parameters() if parameter.grad is not None
            ]
            mean_over_processes(gradients, gradients[0].dtype)
        return loss

    def _loss(self, outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        # a tuple has the auxiliary head's logits too: our `Outputs`, or torchvision's
        main_logits, *auxiliary = [outputs] if isinstance(outputs, Tensor) else outputs
        training = self.config.training
        cross_entropy = partial(
            nn.functional.cross_entropy, target=labels, label_smoothing=training.label_smoothing
        )
        loss: Tensor = cross_entropy(main_logits)
        for logits in auxiliary:
            loss = loss + training.auxiliary_weight * cross_entropy(logits)
        return loss

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        memory_format = torch.channels_last if self.config.machine.channels_last else torch.contiguous_format
        device = self.accelerator.device
        images = batch.images.double() if self.config.training.precision == "float64" else batch.images
        return images.to(device, memory_format=memory_format), batch.labels.to(device)

    def _evaluation_steps(self) -> Iterator[int]:
        steps, evaluation = self.config.training.steps, self.config.evaluation
        if evaluation.apart:
            candidates: Iterable[int] = evaluation_steps(steps, evaluation.apart)
        else:
            every = evaluation.every or self.order.batches_per_epoch
            first = max(self.step, evaluation.first, 1)
            candidates = range(-(-first // every) * every, steps, every)
        yield from (step for step in candidates if step >= evaluation.first)
        yield steps

    def _evaluate(self) -> Iterator[Evaluation | None]:
        """Evaluate on the validation set, with population statistics."""
        self.inference = self.inference_network()
        population = yield from self._evaluate_accuracy(self.inference)
        average = None
        if self.average is not None:
            self.average_inference = self.inference_network(averaged=True)
            average = yield from self._evaluate_accuracy(self.average_inference)
        self._gather_corrupt()
        # of the best alone, which the page shows: 100 classes may take 100 KB
        best = all(population.accuracy > earlier.accuracy for earlier in self.evaluations)
        evaluation = Evaluation(
            job=self.job,
            step=self.step,
            loss=self._mean_loss(),
            accuracy=population.accuracy,
            accuracy_top5=population.accuracy_top5 if self.source.classes > _TOP5_ABOVE_CLASSES else None,
            accuracy_average=average.accuracy if average is not None else None,
            loss_validation=population.loss,
            rate=self.optimizer.param_groups[0]["lr"],
            confusion=population.confused(self.source.classes) if best else None,
        )
        self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0
        self._checked_losses = 0.0, 0
        self.evaluations.append(evaluation)
        yield evaluation

    def inference_network(self, averaged: bool = False) -> nn.Module:
        """A copy in evaluation mode with population statistics (Algorithm 2), over batches spread over an epoch.

        averaged: copy the moving average of the weights, which has no running statistics of its own, instead.
        """
        network = self.average.module if averaged and self.average is not None else self.network
        epoch = self.order.batches_per_epoch
        batches = min(self.config.evaluation.population_batches, epoch)
        steps = [number * epoch // batches for number in range(batches)]
        return inference_copy(network, self.loader.batches(steps), self._forward)

    def _forward(self, network: nn.Module, batch: Batch) -> None:
        network(
            self._to_device(batch)[0]
        )  # not in micro-batches: the statistics are those of the whole batch

    def _evaluate_accuracy(self, network: nn.Module) -> Generator[None, None, Score]:
        """The score over all processes, each of which evaluates its share of the validation set."""
        score = Score()
        batches = iter(self.validation)
        for _ in range(self.validation.rounds):
            batch = next(batches, None)  # None where another process has one more
            if batch is not None:
                images, labels = self._to_device(batch)
                score += Score.of(probabilities(network, images), labels)
            yield None
        whole = sum(gather_object([score]), Score())
        if not whole.images:
            raise DataError(f"none of the validation images can be read: {self.corrupt['val']}")
        return whole

    def _gather_corrupt(self) -> None:
        """Exchange the unreadable images among all processes, so that all count the same total."""
        for corrupt in self.corrupt.values():
            for found in gather_object([corrupt.found]):
                corrupt.add(found)

    def _mean_loss(self) -> float:
        """The mean loss since the previous evaluation, over all processes."""
        if not self.loss_count:
            return math.nan
        return float(self.accelerator.reduce(self.loss_sum / self.loss_count, "mean"))

    def _check(self) -> Check:
        """The loss now, and of the steps since the previous check."""
        mean, (total, steps) = self._mean_loss(), self._checked_losses
        new = self.loss_count - steps
        recent = (mean * self.loss_count - total) / new if new else mean
        self._checked_losses = mean * self.loss_count, self.loss_count
        return Check(self.step, mean, recent, self.optimizer.param_groups[0]["lr"], self.seconds)

    @property
    def is_finite(self) -> bool:
        """Whether the loss and all weights are finite; only then is a checkpoint written."""
        values = (self.loss_sum, *self.network.parameters())
        return not self.diverged and all(bool(value.isfinite().all()) for value in values)

    @property
    def _out_of_patience(self) -> bool:
        patience = self.config.training.patience
        accuracies = [evaluation.accuracy for evaluation in self.evaluations]
        return patience is not None and len(accuracies) - 1 - _argmax(accuracies) >= patience

    def _final_result(self) -> Iterator[Result | None]:
        """The result: that of the last evaluation, and the accuracy with the moving averages."""
        if self.result is None:
            last, moving = self.evaluations[-1], None
            if keeps_statistics(self.network):
                network = copy.deepcopy(self.network).eval()
                reduce_statistics(network)
                moving = yield from self._evaluate_accuracy(network)
            self.result = Result(
                job=self.job,
                config=self.config.model_dump(mode="json"),
                steps=self.step,
                diverged=self.diverged,
                loss=last.loss,
                accuracy=last.accuracy,
                accuracy_moving=moving.accuracy if moving is not None else None,
                unreadable=sum(map(len, self.corrupt.values())),
                unreadable_images=[name for each in self.corrupt.values() for name in each.found][:_NAMED],
                seconds=round(self.seconds, 2),
            )
        yield self.result

    def state_dict(self) -> dict[str, Any]:
        """The state of the run and its records; tensors and plain values.

        A collective operation: all processes must call it.
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
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "random": gather_object([self._random_states()]),
            "loss_sum": self.accelerator.reduce(self.loss_sum, "mean"),
            "losses": self.loss_count,
            "seconds": self.seconds,
            "corrupt": {split: corrupt.state_dict() for split, corrupt in self.corrupt.items()},
            "diverged": self.diverged,
            "evaluations": [evaluation.model_dump_json() for evaluation in self.evaluations],
            "result": self.result.model_dump_json() if self.result is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`. Raises: CheckpointError if it is of a run with other settings, or invalid."""
        if not _is_same_run(self.config, state.get("config")):
            raise CheckpointError(
                f"the checkpoint of {self.job} was trained with other settings: delete it, or use a new folder"
            )
        steps, earlier = self.config.training.steps, state["config"]["training"]["steps"]
        if isinstance(state.get("step"), int) and steps < state["step"] <= earlier:
            raise CheckpointError(
                f"{self.job} was trained for {state['step']:,} steps: training.steps = {steps:,} cannot be fewer"
            )
        with refused(self.job):
            self._expect_state(state)
        self._restore(state)
        if steps > earlier and self.result is not None:
            if self.step < earlier:
                raise CheckpointError(
                    f"{self.job} ended after {self.step:,} of {earlier:,} steps by training.patience: "
                    f"it would not use {steps:,}; start a new run"
                )
            self.result = None  # of the end as it was

    def _expect_state(self, state: dict[str, Any]) -> None:
        """Raise StateError unless `state` can be that of this trainer at some step."""
        own = self.state_dict()
        step = check_progress(state, own, self.config.training.steps)
        for name in ("classes", "channels"):
            check_number(state[name], own[name], own[name], name)
        for name in ("model", "average", "scaler", "diverged", "schedule", "corrupt"):
            check_form(state[name], own[name], name)
        loss = state["loss_sum"]  # its dtype is that of the loss
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            raise StateError("loss_sum is no number")
        settings = self.config.optimizer
        rate = settings.rate * factor(settings, self.config.training.steps, step)
        check_optimizer(state["optimizer"], self.optimizer, rate, step, MOMENTS[settings.name])
        lasting = {"last_epoch": step, "_step_count": step + 1, "_last_lr": state["schedule"]["_last_lr"]}
        for name, value in (own["schedule"] | lasting).items():
            if state["schedule"][name] != value:
                raise StateError(f"schedule.{name} is {state['schedule'][name]!r}, not {value!r}")
        if state["schedule"]["_last_lr"] != [group["lr"] for group in state["optimizer"]["param_groups"]]:
            raise StateError("schedule._last_lr is not the optimizer's rate")
        if not isinstance(state["random"], list) or not state["random"]:
            raise StateError("random is no list of states")
        for place, states in enumerate(state["random"]):
            check_random(states, own["random"][0], f"random[{place}]")
        check_records(state["evaluations"], state["result"], self.job, step)

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, self.loss_count, self.seconds = state["step"], state["losses"], state["seconds"]
        self.loss_sum = state["loss_sum"].to(self.accelerator.device)
        self.network.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        random, rank = state["random"], self.accelerator.process_index
        if rank < len(random):  # with more processes than before, the additional ones keep their seed
            self._set_random_states(random[rank])
        for split, corrupt in self.corrupt.items():
            corrupt.load_state_dict(state["corrupt"][split])
        self.evaluations = [Evaluation.model_validate_json(line) for line in state["evaluations"]]
        self.result = Result.model_validate_json(state["result"]) if state["result"] else None
        self.diverged = state["diverged"]

    def _random_states(self) -> list[Tensor]:
        """The states of this process's random generators: the CPU's, and the accelerator's if there is one."""
        device = self.accelerator.device
        of_device = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
        return [torch.get_rng_state(), *of_device]

    def _set_random_states(self, states: list[Tensor]) -> None:
        device = self.accelerator.device
        torch.set_rng_state(states[0])
        if device.type != "cpu" and len(states) > 1:
            torch.get_device_module(device).set_rng_state(states[1], device)


def _accelerator(config: Config) -> Accelerator:
    """The Accelerator of this run: all processes under torchrun, else just this one."""
    machine = config.machine
    cpu = machine.device == "cpu" or not torch.accelerator.is_available()
    if cpu and config.training.precision == "float16":
        raise NetworkError('[training] precision = "float16" is for accelerators: on a CPU take "bfloat16"')
    # without cpu=True Accelerate does not initialise a process group (gloo) on a machine without an accelerator
    accelerator = Accelerator(cpu=cpu, mixed_precision=_PRECISIONS[config.training.precision])
    if machine.threads is not None:  # after Accelerator, which sets the threads of several processes itself
        torch.set_num_threads(machine.threads)
    if accelerator.device.type == "cpu" and machine.keep_memory:
        keep_memory()
    return accelerator


def _sources(accelerator: Accelerator, name: str) -> tuple[Source, Source]:
    """The training and validation set, loaded by one process of each machine first, which downloads if necessary."""
    found: tuple[Source, Source] | DataError
    with accelerator.local_main_process_first():
        try:
            found = load(name, "train"), load(name, "val")
        except DataError as error:
            found = error
    # raised here: within, the other processes would see only that this one is gone
    if isinstance(found, DataError):
        raise found
    if found[0].classes < 2:
        raise DataError(f"{name} has a single class: there is nothing to tell apart")
    return found


def _is_same_run(config: Config, stored: object) -> bool:
    """Whether `stored`, possibly of an earlier version with fewer keys, determines the same training as `config`."""
    try:
        stored_config = Config.model_validate(stored)
    except ValidationError:
        return False
    return not differences(stored_config, config)


def _argmax(accuracies: list[float]) -> int:
    """The index of the highest accuracy, the first if several are equal."""
    return accuracies.index(max(accuracies)) if accuracies else 0
