"""Build the network of a configuration."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from batchnorm.models.inception import BNInception
from batchnorm.passes.upgrade import upgrade
from batchnorm.training.config import INCEPTION, Config, InceptionModel, LibraryModel

_TIMM = "timm/"  # before the name of a model that torchvision has too


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
    network.eval()
    try:
        with torch.no_grad():
            try:
                images = torch.empty(2, channels, size, size, device="meta")
                torch.func.functional_call(network, without_values, images)
            except Exception as error:
                if "meta" not in str(error):
                    raise
                # its forward makes tensors of its own, on the CPU
                network(torch.zeros(2, channels, size, size))
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
            **model.model_dump(exclude={"name", "weights"}),
        )
    return _from_library(model, config, classes, channels)


def _from_library(model: LibraryModel, config: Config, classes: int, channels: int) -> nn.Module:
    """A model of torchvision, or else of timm, with random weights and with our BN."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        torch.manual_seed(config.training.seed)
        name = model.name.lower().removeprefix(_TIMM)
        known = [] if model.name.lower().startswith(_TIMM) else _torchvision_models()
        if name in known:
            built = _from_torchvision(name, model.dropout, classes, channels)
        elif (timm := _timm()) is not None and timm.is_model(name):
            built = _from_timm(timm, name, model.dropout, config.data.image_size, classes, channels)
        else:
            raise NetworkError(f"model.name = {model.name!r} is {_unknown(name, known, timm)}")
    upgraded, _ = upgrade(built)
    return upgraded


def _from_torchvision(name: str, dropout: float | None, classes: int, channels: int) -> nn.Module:
    from torchvision import models

    if channels != 3:
        raise NetworkError(
            f"{name} takes images of 3 channels, these have {channels}: use name = 'bn-inception', "
            f"or timm's name = '{_TIMM}resnet18'"
        )
    options: dict[str, Any] = {} if dropout is None else {"dropout": dropout}
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    return model


def _from_timm(
    timm: Any, name: str, dropout: float | None, image_size: int, classes: int, channels: int
) -> nn.Module:
    options: dict[str, Any] = {} if dropout is None else {"drop_rate": dropout}
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        options["img_size"] = image_size
    model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels, **options)
    return model


def _torchvision_models() -> list[str]:
    from torchvision import models

    names: list[str] = models.list_models(module=models)
    return names


def _timm() -> Any:
    """timm's module of models, or None where it is not installed."""
    try:
        import timm.models
    except ImportError:
        return None
    return timm


def _unknown(name: str, known: Sequence[str], timm: Any) -> str:
    """What is wrong with a name of no model, and what may have been meant."""
    from torchvision import models

    if known and name in models.list_models():
        what = "a model of torchvision, but none that classifies images"
    else:
        what = "no model"
    of_timm = timm.list_models() if timm is not None else []
    for prefix, names in (("", [INCEPTION, *known] if known else []), ("" if known else _TIMM, of_timm)):
        if near := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
            return f"{what}: did you mean {prefix}{near[0]}?"
    install = "" if timm is not None else "; for timm's: pip install timm"
    return f"{what}: take {INCEPTION}, or one of torchvision's or timm's that classifies{install}"
