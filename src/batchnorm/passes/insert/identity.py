"""`identity=`: γ and β with which a pre-trained model computes what it did."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.calibrate.batches import Forward, run_batches
from batchnorm.calibrate.collecting import Collector
from batchnorm.graph.nonlinearity import Place
from batchnorm.graph.observation import as_it_was
from batchnorm.layers import _BatchNorm


def give_identity(
    model: nn.Module,
    made: dict[str, _BatchNorm],
    taken: dict[str, Place],
    batches: Iterable[Any],
    forward: Forward | None,
) -> list[str]:
    """Give the layers the statistics of what each will see, and the γ and β that undo its normalization.

    Returns: the paths of those that were never called.
    """
    collectors = {path: Collector() for path in made}
    modules = dict(model.named_modules())
    hooks = []
    seen = 0

    def end_batch() -> None:
        nonlocal seen
        seen += 1
        for collector in collectors.values():
            collector.end_batch()

    def add(path: str, value: Tensor) -> None:
        x, place = value.detach(), taken[path]
        assert place.value is not None
        if place.dim == -1:
            x = x.reshape(-1, x.shape[-1])
        elif x.dim() == len(place.value.shape) - 1:  # without a dimension of the batch
            x = x.unsqueeze(0)
        collectors[path].add(x, None)

    try:
        for path in made:
            if taken[path].of_input:
                hooks.append(
                    modules[path].register_forward_pre_hook(
                        lambda _, args, kwargs, path=path: add(path, (*args, *kwargs.values())[0]),
                        with_kwargs=True,
                    )
                )
            else:
                hooks.append(
                    modules[path].register_forward_hook(
                        lambda _, args, returned, path=path: add(path, returned)
                    )
                )
        with as_it_was(model):
            run_batches(model, batches, [], forward, end_batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError("there were no batches in identity=")
    never = [path for path in made if collectors[path].moments is None]
    for path, layer in made.items():
        moments = collectors[path].moments
        if moments is None:
            continue
        if not layer.affine or layer.running_mean is None or layer.running_var is None:
            raise ValueError("identity= needs layers with weight, bias and running statistics: see options=")
        if bool((torch.as_tensor(moments.count) < 2).any()):
            raise ValueError(
                f"{path} saw one value per channel in identity=, which has no variance: give more samples"
            )
        variance = moments.variance()
        if not bool((moments.mean + variance).isfinite().all()):
            raise ValueError(f"what comes to {path} is not finite in the batches of identity=")
        with torch.no_grad():
            layer.running_mean.copy_(moments.mean)
            layer.running_var.copy_(variance)
            layer.weight.copy_((layer.running_var.double() + layer.eps).sqrt())
            layer.bias.copy_(layer.running_mean)
        layer.set_num_batches_tracked(collectors[path].batches)
    return never
