"""The benchmarked networks, built of torch's layers, and the same networks without batch normalization."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from batchnorm.bench.case import FORMATS
from batchnorm.bench.options import NETWORKS as NETWORKS


def build(name: str) -> nn.Module:
    """The network `name`, in training mode, with its initial weights.

    Raises: ImportError when the network is torchvision's or timm's, which is not installed.
    """
    if name == "mlp":
        return _mlp()
    if name.startswith("timm/"):
        import timm

        made: nn.Module = timm.create_model(name.removeprefix("timm/"))
        return made
    from torchvision import models

    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return cast(nn.Module, getattr(models, name)(weights=None, **extra))


def shape(name: str, size: int, images: int) -> tuple[int, ...]:
    """The shape of the input: 60 digits for the MLP (Ioffe & Szegedy 2015, sec. 4.1), images for the others."""
    return (60, 784) if name == "mlp" else (images, 3, size, size)


def layouts(name: str) -> tuple[str, ...]:
    """The memory layouts in which the network is measured."""
    return ("(N, C)",) if name == "mlp" else tuple(FORMATS)


def to_layout(model: nn.Module, x: Tensor, layout: str) -> tuple[nn.Module, Tensor]:
    """The network and its input in `layout`."""
    if layout not in FORMATS:
        return model, x
    return model.to(memory_format=FORMATS[layout]), x.contiguous(memory_format=FORMATS[layout])


def without_norm(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of `model` with every BN replaced by the identity.

    Its weights are scaled so that the outputs of each convolution and linear layer have standard deviation 1 on `x`.
    Otherwise activations would vanish or explode, and arithmetic on denormal numbers is many times slower.
    """
    without_bn = deepcopy(model)
    for parent in list(without_bn.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, nn.Identity())
    hooks = [
        module.register_forward_hook(_to_unit_scale)
        for module in without_bn.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        without_bn(x)
    for hook in hooks:
        hook.remove()
    return without_bn


def set_running_statistics(model: nn.Module, x: Tensor) -> None:
    """Set the running statistics of every BN of `model` to those of the batch `x`, for activations of order 1."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A training step: forward, loss, backward and SGD, at a learning rate that hardly changes the weights."""
    target = torch.randint(10, (len(x),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def call() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            raise FloatingPointError("the loss is inf or nan: the measured step would not be representative")

    return call


def _mlp() -> nn.Module:
    layers: list[nn.Module] = []
    width = 784
    for hidden in (100, 100, 100):
        layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.Sigmoid()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, 10))


def _to_unit_scale(module: Any, arguments: Any, output: Tensor) -> Tensor:
    scale = output.std().clamp_min(1e-12)
    for parameter in module.parameters():
        parameter.div_(scale)
    return output / scale
