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
from batchnorm.graph.modules import is_ours, layers_of
from batchnorm.layers import _BatchNorm
from batchnorm.moments import Moments, positions
from batchnorm.running.domain import active, domain
from batchnorm.statistics.population import thawed
from batchnorm.statistics.sync import Sync

Running = tuple[Tensor, Tensor]


class _Before:
    """The running statistics that a layer had in the domain that is active."""

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        self._layer, self._domain = layer, active()
        self.is_new = is_ours(layer) and not layer.has_domain(
            self._domain
        )  # its statistics are a new layer's
        self._values = [values.clone() for values in _running(layer)]

    def restore(self) -> None:
        if self.is_new and is_ours(self._layer) and self._domain is not None:
            self._layer.remove_domain(self._domain)
            return
        with domain(self._domain):
            # looked up again, for the layer may have been moved or loaded
            for buffer, value in zip(_running(self._layer), self._values, strict=True):
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

    def __init__(self, before: list[_Before], samples: int) -> None:
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
    if active() is not None and any(not is_ours(layer) for layer in layers_of(model).values()):
        raise ValueError(f"torch's layers have no domains, {active()!r} among them: bn.upgrade(model) first")
    layers = {name: layer for name, layer in layers_of(model).items() if layer.running_mean is not None}
    seen = {layer: _Seen() for layer in layers.values()}

    def end_batch() -> None:
        for each in seen.values():
            each.end_batch()

    with _observing(seen):
        run_batches(model, batches, seen, forward, end_batch)
    targets = {}
    for name, layer in layers.items():
        seen[layer].on_all_ranks(name or "of the model", layer)
        if seen[layer].samples:
            targets[name] = _target(name, layer, seen[layer])
    if not targets:
        raise ValueError("there were no samples to adapt to: `batches` gave none that reached a layer")
    before = []
    for name, (mean, variance) in targets.items():
        layer, samples = layers[name], seen[layers[name]].samples
        before.append(_Before(layer))
        share = 1.0 if prior == 0 else 0.0 if math.isinf(prior) else samples / (prior + samples)
        for buffer, source, target in zip(
            _running(layer), (layer.running_mean, layer.running_var), (mean, variance), strict=True
        ):
            assert source is not None
            buffer.copy_(source.to(target.dtype).flatten().lerp(target, share))
        if before[-1].is_new and is_ours(layer):  # or the first batch that trains it would take their place
            layer.set_num_batches_tracked(seen[layer].batches)
    return Adaptation(before, max(each.samples for each in seen.values()))


class _Seen:
    """What a layer has seen of the target."""

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self.samples = self.batches = self._of_batch = 0

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        moments = functional.moments(x, mask)
        self.moments = moments if self.moments is None else self.moments.merge(moments)
        self._of_batch = max(self._of_batch, x.size(0))

    def end_batch(self) -> None:
        """Count its samples once, however often the layer was called."""
        self.samples += self._of_batch
        self.batches += self._of_batch > 0
        self._of_batch = 0

    def on_all_ranks(self, name: str, layer: nn.Module) -> None:
        """Let it be what all ranks have seen together, if the layer is one of several."""
        sync = _sync(layer)
        if sync is not None and self.moments is not None:
            nothing = self.moments.mean.new_zeros(1)
            self.moments = sync.merged(self.moments, name)
            self.samples = int(sync.merged(Moments(self.samples, nothing, nothing), name).count)


@contextmanager
def _observing(seen: dict[nn.modules.batchnorm._BatchNorm, _Seen]) -> Iterator[None]:
    """Let the layers normalise by what they see, and take its moments; their running statistics stay."""
    settings = {layer: _settings(layer) for layer in seen}
    hooks = []
    try:
        for layer, its in seen.items():
            hooks.append(layer.register_forward_hook(_watch(its), with_kwargs=True))
            layer.track_running_stats = False  # in training: by the batch, and nothing moves
            if is_ours(layer):
                layer.statistics = _sync(layer)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, values in settings.items():
            vars(layer).update(values)


def _sync(layer: nn.Module) -> Sync | None:
    """That of a layer which is one of several, frozen or not."""
    statistics = thawed(layer.statistics) if is_ours(layer) else None
    return statistics if isinstance(statistics, Sync) else None


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {name: vars(layer)[name] for name in ("track_running_stats", "statistics") if name in vars(layer)}


def _watch(its: _Seen) -> Any:
    # after the layer, whose errors say more
    def hook(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], _: Tensor) -> None:
        given = dict(zip(("input", "residual", "mask"), arguments, strict=False)) | named
        x, mask = given["input"], given.get("mask")
        mask = None if mask is None else positions(mask, x)
        if isinstance(layer, _BatchNorm) and isinstance(layer.num_features, tuple):
            x, mask = x.flatten(1), None if mask is None else mask.expand_as(x).flatten(1)
        its.add(x, mask)

    return hook


def _target(name: str, layer: nn.modules.batchnorm._BatchNorm, seen: _Seen) -> Running:
    """The mean and unbiased variance of all that the layer has seen."""
    moments = seen.moments
    assert moments is not None and layer.running_mean is not None
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
    if is_ours(layer):
        return layer.running_statistics()
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var
