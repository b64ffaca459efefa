"""A model meets another domain: running statistics of its data, mixed with those that the model came with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from batchnorm import functional
from batchnorm.calibrate.batches import Forward, run_batches
from batchnorm.graph.modules import layers_of
from batchnorm.layers import _BatchNorm
from batchnorm.moments import Moments, positions
from batchnorm.running.domain import active, domain
from batchnorm.statistics.population import thawed
from batchnorm.statistics.sync import Sync

Running = tuple[Tensor, Tensor]


class _SavedStatistics:
    """The running statistics of a layer in the active domain, before they were adapted."""

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        self._layer, self._domain = layer, active()
        self.is_new = isinstance(layer, _BatchNorm) and not layer.has_domain(
            self._domain
        )  # its statistics are the initial ones
        self._values = [values.clone() for values in _buffers(layer)]

    def restore(self) -> None:
        if self.is_new and isinstance(self._layer, _BatchNorm) and self._domain is not None:
            self._layer.remove_domain(self._domain)
            return
        with domain(self._domain):
            # look up the buffers again, as the layer may have been moved or loaded
            for buffer, value in zip(_buffers(self._layer), self._values, strict=True):
                buffer.copy_(value)


class Adaptation:
    """What `adapt` did; `reset()` undoes it, as the end of a `with` block does.

    `adapt` makes it. Its attribute `samples` is the number of samples that the new statistics were taken from.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm1d(4)
        >>> with bn.adapt(layer, [torch.randn(256, 4) + 5]) as adaptation:
        ...     adaptation.samples, bool(layer.running_mean.min() > 4)
        (256, True)
        >>> layer.running_mean
        tensor([0., 0., 0., 0.])
    """

    def __init__(self, before: list[_SavedStatistics], samples: int) -> None:
        self._before = before
        self.samples = samples  # that the new statistics were taken from

    def reset(self) -> None:
        """Give the layers the running statistics back that they had, bit for bit; a domain that began is gone.

        Example:
            >>> import torch, batchnorm as bn
            >>> layer = bn.BatchNorm1d(4)
            >>> adaptation = bn.adapt(layer, [torch.randn(256, 4) + 5])
            >>> adaptation.reset()
            >>> layer.running_mean
            tensor([0., 0., 0., 0.])
        """
        for each in self._before:
            each.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.reset()

    def __repr__(self) -> str:
        return f"{len(self._before)} layers adapted to {self.samples} samples"


def adapt(
    model: nn.Module, batches: Iterable[Any], prior: float = 0, *, forward: Forward | None = None
) -> Adaptation:
    """Give the layers of `model` the statistics of other data, without labels and without a step of training.

        running ← prior/(prior + n) · running + n/(prior + n) · target

    for mean and variance alike, where the target's are the moments of all `batches` merged, the variance unbiased,
    and n is the number of samples in them, as they come to the layer: dimension 0 of its input. prior=0 is AdaBN (Li
    et al. 2016); a prior of some samples is what few samples need (Schneider et al. 2020, eq. 3). Within
    `bn.domain(name)` the result goes to the statistics of that name; the prior's are always the layer's own.

    While the samples pass through, layers normalise by the batch they see and everything else is in evaluation mode;
    afterwards every mode is as before. One pass; with many batches of a few samples the statistics of deep layers
    are those of activations that were normalised by few samples. With Sync every rank needs as many batches.

    Args:
        model: with layers of torch's or ours that keep running statistics.
        batches: tensors, tuples whose first is the input, or mappings of arguments.
        prior: N, how many samples the present statistics count for, 0 or more; inf leaves them as they are.
        forward: called with model and batch, where that is not how the model is called.

    Returns: an Adaptation; its `reset()` undoes this.

    Raises:
        ValueError: a negative prior; no samples at all; a layer that saw one value per channel; layers of torch's
            within a domain.
        RuntimeError: names a layer whose target statistics are not finite.

    After an error nothing has been changed.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(bn.BatchNorm1d(4), torch.nn.Linear(4, 2))
        >>> target = torch.randn(256, 4) + 5
        >>> adaptation = bn.adapt(model, target.split(64), prior=16)
        >>> torch.allclose(model[0].running_mean, target.mean(0) * 256 / (16 + 256))
        True
    """
    if not prior >= 0:
        raise ValueError(f"prior is a number of samples, 0 or more, got {prior}")
    if active() is not None and any(not isinstance(layer, _BatchNorm) for layer in layers_of(model).values()):
        raise ValueError(f"torch's layers have no domains, {active()!r} among them: bn.upgrade(model) first")
    layers = {name: layer for name, layer in layers_of(model).items() if layer.running_mean is not None}
    collectors = {layer: _Collector() for layer in layers.values()}

    def end_batch() -> None:
        for collector in collectors.values():
            collector.end_batch()

    with _collecting(collectors):
        run_batches(model, batches, collectors, forward, end_batch)
    targets = {}
    for name, layer in layers.items():
        collectors[layer].merge_ranks(name or "of the model", layer)
        if collectors[layer].samples:
            targets[name] = _target(name, layer, collectors[layer])
    if not targets:
        raise ValueError("there were no samples to adapt to: `batches` gave none that reached a layer")
    before = []
    for name, (mean, variance) in targets.items():
        layer, samples = layers[name], collectors[layers[name]].samples
        before.append(_SavedStatistics(layer))
        share = 1.0 if prior == 0 else 0.0 if math.isinf(prior) else samples / (prior + samples)
        for buffer, source, target in zip(
            _running(layer), (layer.running_mean, layer.running_var), (mean, variance), strict=True
        ):
            assert source is not None
            buffer.copy_(source.to(target.dtype).flatten().lerp(target, share))
        if isinstance(layer, _BatchNorm):  # or the first batch that trains it would take their place
            if before[-1].is_new:
                layer.set_num_batches_tracked(collectors[layer].batches)
            layer.take_over()
    return Adaptation(before, max(collector.samples for collector in collectors.values()))


class _Collector:
    """Collects the moments of a layer's inputs from the target domain."""

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self.samples = self.batches = self._of_batch = 0

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        moments = functional.moments(x, mask)
        self.moments = moments if self.moments is None else self.moments.merge(moments)
        self._of_batch = max(self._of_batch, x.size(0))

    def end_batch(self) -> None:
        """Add the batch's samples, once even if the layer was called several times."""
        self.samples += self._of_batch
        self.batches += self._of_batch > 0
        self._of_batch = 0

    def merge_ranks(self, name: str, layer: nn.Module) -> None:
        """Merge with the other ranks, if the layer has Sync."""
        sync = _sync(layer)
        if sync is not None and self.moments is not None:
            nothing = self.moments.mean.new_zeros(1)
            self.moments = sync.merged(self.moments, name)
            self.samples = int(sync.merged(Moments(self.samples, nothing, nothing), name).count)


@contextmanager
def _collecting(collectors: dict[nn.modules.batchnorm._BatchNorm, _Collector]) -> Iterator[None]:
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
                layer.statistics = _sync(layer)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, values in settings.items():
            vars(layer).update(values)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _sync(layer: nn.Module) -> Sync | None:
    """The Sync of a layer, frozen or not; None if it has other statistics."""
    statistics = thawed(layer.statistics) if isinstance(layer, _BatchNorm) else None
    return statistics if isinstance(statistics, Sync) else None


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {name: vars(layer)[name] for name in ("track_running_stats", "statistics") if name in vars(layer)}


def _make_hook(collector: _Collector) -> Any:
    # a forward hook, so that the layer's own input checks come first
    def hook(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], _: Tensor) -> None:
        bound = dict(zip(("input", "residual", "mask"), arguments, strict=False)) | named
        x, mask = bound["input"], bound.get("mask")
        mask = None if mask is None else positions(mask, x)
        if isinstance(layer, _BatchNorm) and isinstance(layer.num_features, tuple):
            x, mask = x.flatten(1), None if mask is None else mask.expand_as(x).flatten(1)
        collector.add(x, mask)

    return hook


def _target(name: str, layer: nn.modules.batchnorm._BatchNorm, collector: _Collector) -> Running:
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
        raise RuntimeError(
            f"layer {name!r}: the moments of what it saw are not finite; is there inf or nan in the batches?"
        )
    return mean, variance


def _running(layer: nn.modules.batchnorm._BatchNorm) -> Running:
    if isinstance(layer, _BatchNorm):
        return layer.running_statistics()
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


def _buffers(layer: nn.modules.batchnorm._BatchNorm) -> list[Tensor]:
    """The running statistics of the active domain, and their number, where it is counted."""
    statistics = _running(layer)
    holder = layer.active_statistics() if isinstance(layer, _BatchNorm) else layer
    batches = holder.num_batches_tracked
    return [*statistics, *([] if batches is None else [batches])]
