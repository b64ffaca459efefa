"""What comes to each layer while batches pass through a model, each layer normalising by the batch.

Only batch normalization is in training mode, as in `bn.population`: dropout is off. So each layer gets what its running
statistics are to describe, whatever those of the layers before it are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.calibrate.batches import run_batches
from batchnorm.diagnostics.layer import statistics
from batchnorm.diagnostics.runs import Runs, tensors


@dataclass(frozen=True)
class Arrival:
    """What came to a layer in one call.

    batch: its number.
    samples: N.
    count: N·|S|, values per channel.
    means: (N, C), of each sample.
    spreads: (N, C), of each sample the mean of (x - mean of the batch)².
    lowest, highest: (C,) of what the layer makes of it, before weight and bias: x̂.
    finite: whether all values are.
    padded: the share of positions that are padding, as it seems.
    """

    batch: int
    samples: int
    count: int
    means: Tensor
    spreads: Tensor
    highest: Tensor
    lowest: Tensor
    finite: bool
    padded: float

    @property
    def mean(self) -> Tensor:
        return self.means.mean(0)

    @property
    def variance(self) -> Tensor:
        """Biased, as the batch is normalised."""
        return self.spreads.mean(0)


@dataclass
class LayerMeasured:
    """What came to a layer in all batches.

    eps: the layer's.
    arrivals: in the order of the calls, without those that had inf or nan; one at least.
    """

    eps: float
    arrivals: list[Arrival] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The fewest values per channel of a call."""
        return min(each.count for each in self.arrivals)

    @property
    def samples(self) -> int:
        """Examples in all calls."""
        return sum(each.samples for each in self.arrivals)

    @cached_property
    def mean(self) -> Tensor:
        """(C,) of all values."""
        return self._weighted([each.mean for each in self.arrivals])

    @cached_property
    def variance(self) -> Tensor:
        """(C,) of all values, unbiased."""
        within = self._weighted([each.variance + (each.mean - self.mean).square() for each in self.arrivals])
        total = sum(each.count for each in self.arrivals)
        return within * (total / max(total - 1, 1))

    @cached_property
    def errors(self) -> tuple[Tensor, Tensor]:
        """(C,) each: standard errors of mean and variance, taking samples for independent."""
        means = torch.cat([each.means for each in self.arrivals])
        spreads = torch.cat([each.spreads for each in self.arrivals])
        number = len(means)
        if number < 2:
            return torch.full_like(self.mean, math.inf), torch.full_like(self.mean, math.inf)
        return means.std(0) / number**0.5, spreads.std(0) / number**0.5

    @cached_property
    def noise(self) -> float:
        """How much a batch's statistics move its outputs, in standard deviations of theirs: root mean square."""
        of_mean, of_variance = self.errors
        number = sum(each.samples for each in self.arrivals)
        smallest = min(each.samples for each in self.arrivals)
        larger = number / smallest
        variance = self.variance + self.eps
        shares = larger * (of_mean.square() / variance + (of_variance / variance / 2).square())
        return float(shares[self.varies].mean().sqrt()) if bool(self.varies.any()) else 0.0

    @cached_property
    def varies(self) -> Tensor:
        """(C,) whether a channel is more than one value."""
        return self.variance > 1e-12 * self.mean.square() + 1e-30

    @property
    def differs_by_call(self) -> bool:
        """Whether the first, second, ... calls with a batch have moments that differ by more than chance."""
        numbers: dict[int, int] = {}
        parts: dict[int, LayerMeasured] = {}
        for each in self.arrivals:
            number = numbers[each.batch] = numbers.get(each.batch, -1) + 1
            parts.setdefault(number, LayerMeasured(self.eps)).arrivals.append(each)
        first, *others = parts.values()
        for other in others:
            known = first.varies & other.varies
            gap = first.gap(other.mean, other.variance)[known].square().mean().sqrt()
            if float(gap) > max(0.25, 4 * max(first.by_chance, other.by_chance)):
                return True
        return False

    @property
    def by_chance(self) -> float:
        """The gap of exact statistics, by the standard errors of the batches' mean and variance: root mean square."""
        of_mean, of_variance = self.errors
        spread = self.variance + self.eps
        expected = of_mean.square() / spread + (of_variance / spread / 2).square()
        return float(expected[self.varies].mean().sqrt()) if bool(self.varies.any()) else 0.0

    def gap(self, mean: Tensor, variance: Tensor) -> Tensor:
        """(C,) how far the layer's outputs by these statistics are from those by the batches', in their deviations."""
        own = self.variance + self.eps
        other = (variance + self.eps).clamp(min=1e-30)
        return ((own / other).sqrt() - 1).square().add((self.mean - mean).square() / other).sqrt()

    def distance(self, layer: Any) -> tuple[float, float]:
        """The gap by the layer's running statistics, and that of exact ones by chance: root mean squares.

        By chance: by the standard errors of the batches' mean and variance.
        """
        mean, variance = (each.cpu().flatten() for each in statistics(layer))
        gaps = self.gap(mean, variance)
        known = self.varies & gaps.isfinite()
        if not bool(known.any()):
            return 0.0, 0.0
        return float(gaps[known].square().mean().sqrt()), self.by_chance

    def _weighted(self, values: list[Tensor]) -> Tensor:
        total = sum(each.count for each in self.arrivals)
        return torch.stack(
            [value * (each.count / total) for value, each in zip(values, self.arrivals, strict=True)]
        ).sum(0)


@dataclass
class Measured:
    """What came to all layers.

    layers: by path, those that were called with finite values.
    spoiled: by path, the numbers of the batches that brought it inf or nan.
    order: the paths of all that were called, in the order of their first calls.
    single: by path, the number of the batch that had one value per channel.
    batches: how many went through to the end.
    sizes: examples in each batch.
    repeated: pairs of batches that are the same.
    failure: the error of a batch that did not go through.
    calls: by path, how often it was called with each batch.
    given_padded: whether the batches themselves look padded.
    live: whether it was seen in a training, whose weights change meanwhile.
    """

    layers: dict[str, LayerMeasured] = field(default_factory=dict)
    spoiled: dict[str, list[int]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    single: dict[str, int] = field(default_factory=dict)
    batches: int = 0
    sizes: list[int] = field(default_factory=list)
    repeated: list[tuple[int, int]] = field(default_factory=list)
    failure: str = ""
    calls: dict[str, list[int]] = field(default_factory=dict)
    given_padded: bool = False
    live: bool = False


def measure(runs: Runs, layers: Mapping[str, Any]) -> Measured | str:
    """Run the batches through the model. Returns: what came to each layer, or why nothing did."""
    found = Measured()
    usable = {
        path: layer for path, layer in layers.items() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    }
    if layers and not usable:
        return "its layers are scripted: they are not called one by one"
    found.calls = {path: [] for path in usable}
    with runs.unharmed():
        for number, batch in enumerate(runs.batches):
            _one(found, runs, usable, number, batch)
    if found.batches and not (found.layers or found.spoiled or found.single):
        return "nothing came to its layers"
    if not found.batches and not found.single:
        return found.failure or "the batches gave nothing"
    return found


def _one(found: Measured, runs: Runs, layers: Mapping[str, Any], number: int, batch: Any) -> None:
    given = tensors(batch)
    found.sizes.append(given[0].shape[0] if given and given[0].dim() else 1)
    watch = _Watch(number)
    try:
        with watch.watching(layers):
            run_batches(runs.model, [batch], layers.values(), lambda _, each: runs.call(each))
    except Exception as why:
        if watch.single is not None:
            found.single.setdefault(watch.single, number)
        else:
            found.failure = found.failure or f"batch {number}: {type(why).__name__}: {why}".splitlines()[0]
        return
    found.batches += 1
    found.given_padded |= looks_padded(given)
    for path, calls in watch.arrivals.items():
        found.spoiled.setdefault(path, []).extend(
            dict.fromkeys(each.batch for each in calls if not each.finite)
        )
        finite = [each for each in calls if each.finite]
        if finite:
            found.layers.setdefault(path, LayerMeasured(float(layers[path].eps))).arrivals += finite
    for path in layers:
        found.calls[path].append(len(watch.arrivals.get(path, [])))
    found.order += [path for path in watch.arrivals if path not in found.order]
    others = [tensors(each) for each in runs.batches[:number]]
    found.repeated += [(at, number) for at, other in enumerate(others) if given and _alike(other, given)]


class _Watch:
    """One batch: what comes to the layers, and which one had a single value per channel."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.arrivals: dict[str, list[Arrival]] = {}
        self.single: str | None = None

    @contextmanager
    def watching(self, layers: Mapping[str, Any]) -> Iterator[None]:
        hooks = [
            layer.register_forward_pre_hook(self._hook(path), with_kwargs=True)
            for path, layer in layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str) -> Any:
        def hook(layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = arguments[0] if arguments else named["input"]
            if not isinstance(x, Tensor) or x.dim() < 2 or not x.numel():
                return
            per_activation = isinstance(layer.num_features, tuple)
            x = x.detach().flatten(1) if per_activation else x.detach()
            if x.numel() // x.shape[1] == 1:
                self.single = path
                return
            self.arrivals.setdefault(path, []).append(arrival(self._number, x))

        return hook


def arrival(number: int, x: Tensor) -> Arrival:
    """The statistics of (N, C, *S)."""
    samples, channels = x.shape[:2]
    flat = x.reshape(samples, channels, -1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    spread, means = (each.double() for each in torch.var_mean(flat, 2, correction=0))
    mean = means.mean(0)
    spreads = spread + (means - mean).square()
    deviation = spreads.mean(0).clamp(min=1e-30).sqrt()
    high, low = ((each.double() - mean) / deviation for each in (flat.amax((0, 2)), flat.amin((0, 2))))
    finite = bool(means.isfinite().all() and spreads.isfinite().all())
    means, spreads, high, low = (each.cpu() for each in (means, spreads, high, low))
    return Arrival(number, samples, samples * flat.shape[2], means, spreads, high, low, finite, padding(x))


def padding(x: Tensor) -> float:
    """The share of positions at the ends of sequences or images that look like padding, all alike in each sample.

    Only where the ends differ between samples, and the beginnings do not look so too, as the black borders of images
    do.
    """
    if x.dim() < 3 or not x.numel():
        return 0.0
    for dim in range(2, x.dim()):
        lines = x.movedim(dim, 1).flatten(2)  # (N, length, the rest)
        if lines.shape[1] < 4:
            continue
        at_the_end, at_the_beginning = _run(lines.flip(1)), _run(lines)
        varies = bool((at_the_end != at_the_end[0]).any())
        if varies and float(at_the_beginning.mean()) < 0.25 * float(at_the_end.mean()):
            share = float(at_the_end.mean()) / lines.shape[1]
            if share > 0.02:
                return share
    return 0.0


def looks_padded(batch: list[Tensor]) -> bool:
    """Whether a tensor of it ends as padding does, or says where padding is, or examples have several sizes."""
    shapes = {each.shape for each in batch if each.dim() > 1}
    several = len(shapes) > 1 and len({len(shape) for shape in shapes}) == 1
    return several or any(
        each.dtype == torch.bool
        or (each.dim() > 1 and padding(each if each.dim() > 2 else each[:, None]) > 0)
        for each in batch
    )


def _run(lines: Tensor) -> Tensor:
    """(N,) how many lines at the beginning of each are the same as the first, where there are two at least."""
    same = (lines == lines[:, :1]).all(2)
    length = same.long().cumprod(1).sum(1)
    return torch.where(length > 1, length, 0).double()


def _alike(one: list[Tensor], other: list[Tensor]) -> bool:
    first, second = one[0], other[0]
    return first.shape == second.shape and torch.equal(first, second)


def analysis_of_variance(means: list[Tensor]) -> float:
    """F of an analysis of variance over batches, averaged over channels: 1 for shuffled samples."""
    every = torch.cat(means)
    varies = every.std(0) > 1e-9 * every.abs().mean(0) + 1e-30
    if not bool(varies.any()):
        return 0.0
    middle = every.mean(0)
    between = torch.stack([len(each) * (each.mean(0) - middle).square() for each in means]).sum(0) / (
        len(means) - 1
    )
    freedom = max(len(every) - len(means), 1)
    within = torch.stack([(each - each.mean(0)).square().sum(0) for each in means]).sum(0) / freedom
    return float(between[varies].sum() / within[varies].sum().clamp(min=1e-30))
