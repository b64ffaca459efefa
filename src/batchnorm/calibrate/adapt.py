"""A model meets another domain: running statistics of its data, mixed with those that the model came with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Self

from torch import nn

from batchnorm.calibrate.batches import Forward, run_batches
from batchnorm.calibrate.collecting import Collector, SavedStatistics, collecting, population_of, running
from batchnorm.graph.modules import layers_of
from batchnorm.layers import _BatchNorm
from batchnorm.running.domain import active


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

    def __init__(self, before: list[SavedStatistics], samples: int) -> None:
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
    collectors = {layer: Collector() for layer in layers.values()}

    def end_batch() -> None:
        for collector in collectors.values():
            collector.end_batch()

    with collecting(collectors):
        run_batches(model, batches, collectors, forward, end_batch)
    targets = {}
    for name, layer in layers.items():
        collectors[layer].merge_ranks(name or "of the model", layer)
        if collectors[layer].samples:
            targets[name] = population_of(name, layer, collectors[layer])
    if not targets:
        raise ValueError("there were no samples to adapt to: `batches` gave none that reached a layer")
    before = []
    for name, (mean, variance) in targets.items():
        layer, samples = layers[name], collectors[layers[name]].samples
        before.append(SavedStatistics(layer))
        share = 1.0 if prior == 0 else 0.0 if math.isinf(prior) else samples / (prior + samples)
        for buffer, source, target in zip(
            running(layer), (layer.running_mean, layer.running_var), (mean, variance), strict=True
        ):
            assert source is not None
            buffer.copy_(source.to(target.dtype).flatten().lerp(target, share))
        if isinstance(layer, _BatchNorm):  # or the first batch that trains it would take their place
            if before[-1].is_new:
                layer.set_num_batches_tracked(collectors[layer].batches)
            layer.take_over()
    return Adaptation(before, max(collector.samples for collector in collectors.values()))
