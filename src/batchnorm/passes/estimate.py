"""`population(model, batches)`: the running statistics that inference is to use, measured (Algorithm 2, line 10)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.calibrate.batches import Forward, run_batches
from batchnorm.calibrate.collecting import (
    Collector,
    NotFinite,
    SavedStatistics,
    collecting,
    population_of,
    running,
    sync_of,
)
from batchnorm.graph.modules import layers_of, normalizes
from batchnorm.layers import _BatchNorm
from batchnorm.moments import Moments
from batchnorm.passes.report import LayerReport, Report
from batchnorm.statistics.population import Population

Estimator = Literal["paper", "pooled"]
Model = TypeVar("Model", bound=nn.Module)
_Layer = nn.modules.batchnorm._BatchNorm
_LEAST = 4  # batches, of which a standard error says something


@dataclass(frozen=True)
class PopulationReport(Report):
    """The outcome for each layer: "measured", from how much and how exactly, or "left alone" and why.

    Args:
        layers: one for each layer.
        batches: how many passed through the model on this rank.
        errors: by path, the standard error of a layer's statistics: that of the mean in standard deviations, or that of
            the variance as a share of it, whichever is larger, root mean square over the channels; nan for one batch.
    """

    batches: int = 0
    errors: tuple[tuple[str, float], ...] = ()

    @property
    def error(self) -> float:
        """The largest standard error of a layer; nan where there is none."""
        return max((error for _, error in self.errors), default=float("nan"))

    @property
    def summary(self) -> str:
        """The number of layers with each outcome, of batches, and the largest standard error, in one line."""
        plural = "" if self.batches == 1 else "es"
        return f"{super().summary} ({self.batches:,} batch{plural}, standard error {self.error:.2%} or less)"


def population(
    model: nn.Module,
    batches: Iterable[Any],
    estimator: Estimator = "paper",
    forward: Forward | None = None,
    *,
    tolerance: float = 0.0,
    sequential: bool = False,
    frozen: bool = False,
    group: Any = None,
    progress: bool = False,
) -> PopulationReport:
    """Measure the population statistics of every layer over `batches`, and make them its running statistics.

        paper    E[x] = Σ n_B·mean_B / Σ n_B         Var[x] = Σ n_B·(n_B/(n_B - 1)·variance_B) / Σ n_B
        pooled   E[x], Var[x] of all values together, unbiased

    over batches B of n_B values per channel (Ioffe & Szegedy 2015, algorithm 2, line 10; section 3.1). The moving
    averages of training are those of weights that were changing, and of the last batches most. Both estimators agree on
    shuffled data; where batches differ more than samples do, the paper's variance is that within batches, pooled that
    of all data.

    Only these layers are in training mode meanwhile: dropout, for example, is off. A layer normalises by the batch it
    sees, as in training. Running statistics are written at the end: after an error or Ctrl-C the model is as it was.
    With several processes, each with its own batches, however many, all get the statistics of all.

    Args:
        model: with layers of torch's or ours that keep running statistics.
        batches: tensors, tuples whose first is the input, or mappings of arguments.
        estimator: see above.
        forward: called with model and batch, where that is not how the model is called.
        tolerance: stop when the standard error of every layer is below it: 0.01 is a hundredth of a standard deviation.
        sequential: measure each layer with those before it in evaluation mode already, which is what it will see. One
            pass for each layer: `batches` must be a list or a loader that can be begun again.
        frozen: whether frozen layers (`bn.freeze`) are measured too.
        group: of processes; None: all.
        progress: write how far it is to stderr.

    Returns: a PopulationReport.

    Raises:
        ValueError: an unknown estimator; no layers; no samples; a layer that saw one value per channel; `sequential`
            with an iterator.
        RuntimeError: names a layer whose statistics are not finite.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout())
        >>> data = torch.randn(512, 4)
        >>> report = bn.population(model, data.split(64))
        >>> report["1"].outcome, report.batches
        ('measured', 8)
        >>> expected = model[0](data).mean(0)
        >>> torch.allclose(model[1].running_mean, expected, atol=1e-5)
        True
    """
    if estimator not in ("paper", "pooled"):
        raise ValueError(f'estimator must be "paper" or "pooled", got {estimator!r}')
    if sequential and iter(batches) is batches:
        raise ValueError(
            "sequential=True passes over the batches once for each layer: give a list or a loader, not an iterator"
        )
    layers, why = _layers(model, frozen)
    if not layers:
        raise ValueError(
            "the model has no layer whose statistics could be measured"
            + "".join(f"; {name or 'it'} {reason}" for name, reason in list(why.items())[:3])
        )
    run = _Run(model, batches, estimator, forward, tolerance, group, sys.stderr if progress else None)
    saved = [SavedStatistics(layer) for layer in layers.values()]
    random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        measured = run.sequence(layers) if sequential else run.together(layers)
        if not measured:
            raise ValueError("there were no samples: `batches` gave none that reached a layer")
    except BaseException:
        torch.set_rng_state(random[0])
        if random[1]:
            torch.cuda.set_rng_state_all(random[1])
        for each in saved:
            each.restore()
        raise
    reports = []
    for name, module in model.named_modules():
        if not normalizes(module):
            continue
        if name in measured:
            found = measured[name]
            exactly = "" if found.error != found.error else f", standard error {found.error:.2%}"
            reports.append(LayerReport(name, "measured", f"{found.samples:,} samples{exactly}"))
        else:
            reports.append(LayerReport(name, "left alone", why=why.get(name, "was not called")))
    errors = tuple((name, found.error) for name, found in measured.items())
    return PopulationReport(tuple(reports), run.batches_seen, errors)


def inference_copy(model: Model, batches: Iterable[Any], forward: Forward | None = None) -> Model:
    """A copy of `model` in evaluation mode, with the population statistics over `batches` (algorithm 2, lines 8 to 11).

    Of a network that has diverged, whose statistics are not finite, the moving averages stay.
    """
    model = copy.deepcopy(model).eval()
    if _layers(model, frozen=False)[0]:
        with suppress(NotFinite):
            population(model, batches, forward=forward)
    return model


@dataclass(frozen=True)
class _Measured:
    mean: Tensor
    variance: Tensor
    samples: int
    batches: int
    error: float


class _Average:
    """Weighted means over batches of mean and variance, and their spread."""

    def __init__(self, channels: int) -> None:
        self.weight = self.squares = 0.0
        self.means = torch.zeros(2, channels, dtype=torch.float64)  # of the batches' means and variances
        self.spread = torch.zeros(2, channels, dtype=torch.float64)  # Σ w·(value - mean)²

    def add(self, moments: Moments) -> None:
        """A batch: its moments, weighted by its number of values."""
        count = float(torch.as_tensor(moments.count).double().mean())
        if count < 2:
            return
        values = torch.stack([moments.mean, moments.variance(unbiased=True)]).double().cpu()
        self.weight, self.squares = self.weight + count, self.squares + count**2
        before = values - self.means
        self.means += before * (count / self.weight)
        self.spread += count * before * (values - self.means)

    @property
    def error(self) -> float:
        """The standard error, see PopulationReport; nan for one batch."""
        number = self.weight**2 / self.squares if self.squares else 0.0  # of batches of one size, as many
        if number <= 1.5:
            return float("nan")
        deviations = (self.spread / self.weight / (number - 1)).sqrt()
        variance = self.means[1].clamp(min=1e-30)
        relative = deviations / torch.stack([variance.sqrt(), variance])
        return float(relative.square().mean(1).sqrt().max())


@dataclass
class _Run:
    """A pass over the batches, or one for each layer."""

    model: nn.Module
    batches: Iterable[Any]
    estimator: Estimator
    forward: Forward | None
    tolerance: float
    group: Any
    stream: TextIO | None
    batches_seen: int = 0

    def together(self, layers: dict[str, _Layer], title: str = "") -> dict[str, _Measured]:
        """Measure all of these at once, and write what was found."""
        collectors = {layer: Collector(_over_ranks(name, layer)) for name, layer in layers.items()}
        averages: dict[_Layer, _Average] = {}
        self.batches_seen = 0

        def end_batch() -> None:
            self.batches_seen += 1
            for layer, collector in collectors.items():
                moments = collector.end_batch()
                if moments is not None:
                    if layer not in averages:
                        averages[layer] = _Average(moments.mean.numel())
                    averages[layer].add(moments)
            self._show(
                title, max((each.samples for each in collectors.values()), default=0), averages.values()
            )

        def enough() -> bool:
            errors = [each.error for each in averages.values()]
            small = bool(errors) and all(error < self.tolerance for error in errors)
            return small and self.batches_seen >= _LEAST

        try:
            with collecting(collectors):
                run_batches(self.model, _until(self.batches, enough), collectors, self.forward, end_batch)
        finally:
            if self.stream is not None:
                self.stream.write("\n")
        found = self._merged(layers, collectors, averages)
        for name, measured in found.items():
            _write(layers[name], measured)
        return found

    def sequence(self, layers: dict[str, _Layer]) -> dict[str, _Measured]:
        """Measure one after the other, in the order in which they are called."""
        found: dict[str, _Measured] = {}
        for number, (name, layer) in enumerate(self._in_order(layers).items()):
            found |= self.together({name: layer}, f"layer {number + 1} of {len(layers)}, ")
        return found

    def _in_order(self, layers: dict[str, _Layer]) -> dict[str, _Layer]:
        """The layers that are called with the first batch, in that order; then the others."""
        called: dict[str, _Layer] = {}
        hooks = [
            layer.register_forward_pre_hook(
                lambda *_, name=name: called.setdefault(name, layers[name]) and None
            )
            for name, layer in layers.items()
        ]
        try:
            run_batches(self.model, _until(self.batches, lambda: True), [], self.forward)
        finally:
            for hook in hooks:
                hook.remove()
        order = [*called, *(name for name in layers if name not in called)]
        if dist.is_available() and dist.is_initialized():  # the ranks measure one layer at a time, together
            dist.broadcast_object_list(order, group_src=0, group=self.group)
        return {name: layers[name] for name in order}

    def _merged(
        self,
        layers: dict[str, _Layer],
        collectors: dict[_Layer, Collector],
        averages: dict[_Layer, _Average],
    ) -> dict[str, _Measured]:
        """The statistics of the layers over all ranks, but of those that saw no samples on any."""
        rows = []
        for layer in layers.values():
            channels = running(layer)[0].numel()
            average = averages.get(layer, _Average(channels))
            rows.append(_row(collectors[layer], average, channels, tells=_is_first(layer)))
        gathered = self._gathered(torch.cat(rows)).split([len(row) for row in rows], dim=1)
        found = {}
        for (name, layer), ranks in zip(layers.items(), gathered, strict=True):
            samples, batches = (int(each) for each in ranks[:, :2].sum(0))
            if samples:
                found[name] = self._measured(name, layer, collectors[layer], ranks, samples, batches)
        return found

    def _measured(
        self, name: str, layer: _Layer, collector: Collector, ranks: Tensor, samples: int, batches: int
    ) -> _Measured:
        counts, means, squares, weights, of_means, of_variances = (
            ranks[:, 2:-1].unflatten(1, (6, -1)).unbind(1)
        )
        collector.moments = Moments(counts, means, squares).total()
        mean, variance = population_of(name, layer, collector)
        if self.estimator == "paper":
            shares = weights / weights.sum(0)
            mean, variance = (shares * of_means).sum(0), (shares * of_variances).sum(0)
        errors = ranks[:, -1]
        errors = errors[~errors.isnan()]  # of independent estimates
        error = float(errors.square().sum().sqrt() / len(errors)) if len(errors) else float("nan")
        return _Measured(mean, variance, samples, batches, error)

    def _gathered(self, own: Tensor) -> Tensor:
        """A row for each rank."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self.group) == 1:
            return own[None]
        if dist.get_backend(self.group) == "nccl":
            own = own.cuda()
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(rows, own, group=self.group)
        return torch.stack(rows).cpu()

    def _show(self, title: str, samples: int, averages: Iterable[_Average]) -> None:
        if self.stream is None:
            return
        error = max((each.error for each in averages), default=float("nan"))
        exactly = "" if error != error else f", standard error {error:.2%}"
        self.stream.write(
            f"\rpopulation: {title}{self.batches_seen:,} batches, {samples:,} samples{exactly}  "
        )
        self.stream.flush()


def _over_ranks(name: str, layer: _Layer) -> Callable[[Moments], Moments] | None:
    """With Sync a batch is that of all ranks."""
    sync = sync_of(layer)
    return None if sync is None else lambda moments: sync.merged(moments, name)


def _is_first(layer: _Layer) -> bool:
    """Whether this rank is the one that tells of a layer with Sync what all have; without it each does."""
    sync = sync_of(layer)
    if sync is None or not (dist.is_available() and dist.is_initialized()):
        return True
    return dist.get_rank(sync.process_group) == 0


def _row(collector: Collector, average: _Average, channels: int, tells: bool) -> Tensor:
    """What a rank tells of a layer: samples, batches; count, mean, m2; weight, mean of means, of variances; error."""
    zeros = torch.zeros(2, channels, dtype=torch.float64)
    moments = (collector.moments if tells else None) or Moments(0, *zeros)
    average = average if tells else _Average(channels)
    mean = moments.mean.double().cpu()
    batches = float(collector.batches if tells else 0)
    parts = [
        torch.tensor([float(collector.samples), batches], dtype=torch.float64),
        torch.as_tensor(moments.count, dtype=torch.float64).cpu().expand_as(mean),
        mean,
        moments.m2.double().cpu(),
        torch.full_like(mean, average.weight),
        *average.means,
        torch.tensor([average.error], dtype=torch.float64),
    ]
    return torch.cat([part.flatten() for part in parts])


def _until(batches: Iterable[Any], enough: Callable[[], bool]) -> Iterator[Any]:
    for batch in batches:
        yield batch
        if enough():
            return


def _write(layer: _Layer, measured: _Measured) -> None:
    with torch.no_grad():
        for buffer, value in zip(running(layer), (measured.mean, measured.variance), strict=True):
            buffer.copy_(value)
    if isinstance(layer, _BatchNorm):
        layer.set_num_batches_tracked(measured.batches)
        layer.take_over()
    elif layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(measured.batches)


def measurable(model: nn.Module) -> list[str]:
    """The paths of the layers that `population` measures."""
    return list(_layers(model, frozen=False)[0])


def _layers(model: nn.Module, frozen: bool) -> tuple[dict[str, _Layer], dict[str, str]]:
    """The layers to be measured, and why others are not."""
    found: dict[str, _Layer] = {}
    why: dict[str, str] = {}
    every = layers_of(model)
    for name, module in model.named_modules():
        if name not in every and normalizes(module):
            why[name] = f"is {type(module).__name__}, whose statistics are not measured"
    for name, layer in every.items():
        if layer.running_mean is None:
            why[name] = "keeps no running statistics"
        elif isinstance(layer, _BatchNorm) and isinstance(layer.statistics, Population) and not frozen:
            why[name] = "is frozen: frozen=True measures it too"
        else:
            found[name] = layer
    return found, why
