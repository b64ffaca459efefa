"""Build the network of a configuration."""

from __future__ import annotations

import difflib
import warnings
from typing import Any

import torch
from torch import nn

from batchnorm.models.inception import BNInception
from batchnorm.passes.upgrade import upgrade
from batchnorm.training.config import INCEPTION, Config, InceptionModel, TorchvisionModel


class NetworkError(Exception):
    """A network that cannot be built; the message says why and what to do."""


def build(config: Config, classes: int, channels: int) -> nn.Module:
    """The network of `config.model` for images of `channels` channels, its weights drawn from the seed.

    Raises: NetworkError for an unknown name or argument.
    """
    try:
        network = _build(config, classes, channels)
    except (ValueError, TypeError) as error:
        raise NetworkError(f"[model]: {error}") from None
    _expect_size(network, config, channels)
    return network


def _expect_size(network: nn.Module, config: Config, channels: int) -> None:
    """Raise NetworkError unless the network takes images of this size: without computing, on the device "meta"."""
    size, training = config.data.image_size, network.training
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    without_values = {name: values.detach().to("meta") for name, values in tensors.items()}
    try:
        with torch.no_grad():
            torch.func.functional_call(
                network.eval(), without_values, torch.empty(2, channels, size, size, device="meta")
            )
    except (AssertionError, RuntimeError, ValueError) as error:
        why = str(error).strip().split("\n")[0]
        raise NetworkError(
            f"{config.model.name} does not take images of data.image_size = {size}: {why}"
        ) from None
    finally:
        network.train(training)


def _build(config: Config, classes: int, channels: int) -> nn.Module:
    model = config.model
    if isinstance(model, InceptionModel):
        return BNInception(
            classes,
            in_channels=channels,
            image_size=config.data.image_size,
            generator=torch.Generator().manual_seed(config.training.seed),
            **model.model_dump(exclude={"name"}),
        )
    return _from_torchvision(model, classes, channels, config.training.seed)


def _from_torchvision(model: TorchvisionModel, classes: int, channels: int, seed: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if model.name.lower() not in known:
        near = difflib.get_close_matches(model.name.lower(), [INCEPTION, *known], n=1, cutoff=0.5)
        other = model.name.lower() in models.list_models()
        what = "a model of torchvision, but none that classifies images" if other else "no model"
        hint = (
            f"did you mean {near[0]}?"
            if near
            else "take bn-inception, or one of torchvision's that classifies"
        )
        raise NetworkError(f"model.name = {model.name!r} is {what}: {hint}")
    if channels != 3:
        raise NetworkError(
            f"{model.name} takes images of 3 channels, these have {channels}: use name = 'bn-inception'"
        )
    options: dict[str, Any] = {} if model.dropout is None else {"dropout": model.dropout}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        torch.manual_seed(seed)
        built: nn.Module = models.get_model(model.name, weights=None, num_classes=classes, **options)
    upgraded, _ = upgrade(built)
    return upgraded
