"""Build the network of a configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from batchnorm.models.inception import BNInception
from batchnorm.passes.upgrade import upgrade
from batchnorm.training.config import Config, InceptionModel, TorchvisionModel


class NetworkError(Exception):
    """A network that cannot be built; the message says why and what to do."""


def build(config: Config, classes: int, channels: int) -> nn.Module:
    """The network of `config.model` for images of `channels` channels, its weights drawn from the seed.

    Raises: NetworkError for an unknown name or argument.
    """
    model = config.model
    try:
        if isinstance(model, InceptionModel):
            return BNInception(
                classes,
                in_channels=channels,
                image_size=config.data.image_size,
                generator=torch.Generator().manual_seed(config.training.seed),
                **model.model_dump(exclude={"name"}),
            )
        return _from_torchvision(model, classes, channels, config.training.seed)
    except (ValueError, TypeError) as error:
        raise NetworkError(f"[model]: {error}") from None


def _from_torchvision(model: TorchvisionModel, classes: int, channels: int, seed: int) -> nn.Module:
    from torchvision import models

    if channels != 3:
        raise NetworkError(
            f"{model.name} takes images of 3 channels, these have {channels}: use name = 'bn-inception'"
        )
    options: dict[str, Any] = {} if model.dropout is None else {"dropout": model.dropout}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built: nn.Module = models.get_model(model.name, weights=None, num_classes=classes, **options)
    upgraded, _ = upgrade(built)
    return upgraded
