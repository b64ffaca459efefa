"""What a layer of batch normalization is and says of itself, of whatever library it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.graph.modules import has_statistics, is_normalization, is_ours
from batchnorm.statistics.population import Population, thawed
from batchnorm.statistics.sync import Sync


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is a layer of batch normalization, of whatever library, and not a block that has one in it."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    own = has_statistics(module) and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
    return own and is_normalization(module)


def is_frozen(layer: nn.Module) -> bool:
    """Whether its statistics stay as they are in training too: by `bn.freeze`, or by its class."""
    if is_ours(layer):
        return isinstance(layer.statistics, Population)
    return not isinstance(layer, nn.modules.batchnorm._BatchNorm) and not hasattr(layer, "momentum")


def is_synchronized(layer: nn.Module) -> bool:
    """Whether it normalises by the batch of all processes."""
    if is_ours(layer):
        return isinstance(thawed(layer.statistics), Sync)
    return isinstance(layer, nn.SyncBatchNorm)


def statistics(layer: Any) -> tuple[Tensor, Tensor]:
    """Running mean and variance in float64."""
    return layer.running_mean.detach().double(), layer.running_var.detach().double()


def batches_tracked(layer: Any) -> int | None:
    """How many batches it has seen; None where it does not count."""
    count = getattr(layer, "num_batches_tracked", None)
    return None if count is None else int(count)


def is_initial(layer: Any) -> bool:
    """Whether its statistics are the 0 and 1 with which they begin."""
    mean, variance = layer.running_mean, layer.running_var
    return bool((mean == 0).all()) and bool((variance == 1).all())


def averages(model: nn.Module) -> list[Any]:
    """The models in it that torch's AveragedModel averages, whose buffers are copies of the last one's."""
    kind = torch.optim.swa_utils.AveragedModel
    return [
        each
        for each in model.modules()
        if isinstance(each, kind) and not each.use_buffers and int(each.n_averaged) > 1
    ]
