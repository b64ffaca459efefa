"""What comes to each layer while batches pass through a model, and the running statistics that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import functional
from batchnorm.layers import _BatchNorm
from batchnorm.moments import Moments, positions
from batchnorm.running.domain import active, domain
from batchnorm.statistics.population import thawed
from batchnorm.statistics.sync import Sync

Running = tuple[Tensor, Tensor]


class NotFinite(RuntimeError):
    """What comes to a layer has a mean or variance that is inf or nan."""


class SavedStatistics:
    """The running statistics of a layer in the active domain, before they were adapted."""

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        self._layer, self._domain = layer, active()
        self.is_new = isinstance(layer, _BatchNorm) and not layer.has_domain(
            self._domain
        )  # its statistics are the initial ones
        self._values = [values.clone() for values in buffers_of(layer)]

    def restore(self) -> None:
        if self.is_new and isinstance(self._layer, _BatchNorm) and self._domain is not None:
            self._layer.remove_domain(self._domain)
            return
        with domain(self._domain):
            # look up the buffers again, as the layer may have been moved or loaded
            for buffer, value in zip(buffers_of(self._layer), self._values, strict=True):
                buffer.copy_(value)


class Collector:
    """Collects the moments of a layer's inputs.

    over_ranks: makes of a batch's moments those of the batch over all ranks, by which a layer with Sync normalises.
    """

    def __init__(self, over_ranks: Callable[[Moments], Moments] | None = None) -> None:
        self._over_ranks = over_ranks
        self.moments: Moments | None = None
        self.samples = self.batches = self._samples_of_batch = 0
        self._of_batch: Moments | None = None

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        moments = functional.moments(x, mask)
        self._of_batch = moments if self._of_batch is None else self._of_batch.merge(moments)
        self._samples_of_batch = max(self._samples_of_batch, x.size(0))

    def end_batch(self) -> Moments | None:
        """Add the batch, its samples once even if the layer was called several times; return its moments, if any."""
        moments = self._of_batch
        if moments is not None:
            if self._over_ranks is not None:
                moments = self._over_ranks(moments)
            self.moments = moments if self.moments is None else self.moments.merge(moments)
        self.samples += self._samples_of_batch
        self.batches += self._samples_of_batch > 0
        self._of_batch, self._samples_of_batch = None, 0
        return moments

    def merge_ranks(self, name: str, layer: nn.Module) -> None:
        """Merge with the other ranks, if the layer has Sync."""
        sync = sync_of(layer)
        if sync is not None and self.moments is not None:
            nothing = self.moments.mean.new_zeros(1)
            self.moments = sync.merged(self.moments, name)
            self.samples = int(sync.merged(Moments(self.samples, nothing, nothing), name).count)


@contextmanager
def collecting(collectors: dict[nn.modules.batchnorm._BatchNorm, Collector]) -> Iterator[None]:
    """Let the layers normalise by the batch and collect its moments; running statistics are as before afterwards."""
    settings = {layer: _settings(layer) for layer in collectors}
    # a forward of somebody's own may move them all the same
    buffers = [(each, each.clone()) for layer in collectors for each in layer.buffers()]
    hooks = []
    try:
        for layer, collector in collectors.items():
            hooks.append(layer.register_forward_hook(_make_hook(collector), with_kwargs=True))
            layer.track_running_stats = False  # in training: batch statistics, no running update
            if isinstance(layer, _BatchNorm):
                layer.statistics = sync_of(layer)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, values in settings.items():
            vars(layer).update(values)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def sync_of(layer: nn.Module) -> Sync | None:
    """The Sync of a layer, frozen or not; None if it has other statistics."""
    statistics = thawed(layer.statistics) if isinstance(layer, _BatchNorm) else None
    return statistics if isinstance(statistics, Sync) else None


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {name: vars(layer)[name] for name in ("track_running_stats", "statistics") if name in vars(layer)}


def _make_hook(collector: Collector) -> Any:
    # a forward hook, so that the layer's own input checks come first
    def hook(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], _: Tensor) -> None:
        bound = dict(zip(("input", "residual", "mask"), arguments, strict=False)) | named
        x, mask = bound["input"], bound.get("mask")
        mask = None if mask is None else positions(mask, x)
        if isinstance(layer, _BatchNorm) and isinstance(layer.num_features, tuple):
            x, mask = x.flatten(1), None if mask is None else mask.expand_as(x).flatten(1)
        collector.add(x, mask)

    return hook


def population_of(name: str, layer: nn.modules.batchnorm._BatchNorm, collector: Collector) -> Running:
    """The mean and unbiased variance of all inputs of the layer."""
    moments = collector.moments
    assert moments is not None and layer.running_mean is not None
    if not bool((torch.as_tensor(moments.count) > 0).any()):
        raise ValueError(f"layer {name!r} saw no values, only empty inputs or padding: adapt to samples")
    if bool((torch.as_tensor(moments.count) == 1).any()):
        raise ValueError(
            f"layer {name!r} saw one value per channel, which has no variance: adapt to more samples"
        )
    mean, variance = moments.mean, moments.variance(unbiased=True)
    if not bool((mean + variance).to(layer.running_mean.dtype).isfinite().all()):
        raise NotFinite(
            f"layer {name!r}: the moments of what it saw are not finite; is there inf or nan in the batches?"
        )
    return mean, variance


def running(layer: nn.modules.batchnorm._BatchNorm) -> Running:
    if isinstance(layer, _BatchNorm):
        return layer.running_statistics()
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


def buffers_of(layer: nn.modules.batchnorm._BatchNorm) -> list[Tensor]:
    """The running statistics of the active domain, and their number, where it is counted."""
    statistics = running(layer)
    holder = layer.active_statistics() if isinstance(layer, _BatchNorm) else layer
    batches = holder.num_batches_tracked
    return [*statistics, *([] if batches is None else [batches])]
