"""The optimizer of a run and the course of its learning rate, by the names of torch.optim."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

from batchnorm.training.config import Optimizer

# What the optimizers keep for a parameter, apart from Adam's "step": each of the parameter's shape and dtype.
MOMENTS = {"SGD": {"momentum_buffer"}, "AdamW": {"exp_avg", "exp_avg_sq"}}


def optimizer(network: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of a network: weight decay for the weights of convolutions and linear layers alone."""
    groups = _parameter_groups(network, settings.weight_decay)
    if settings.name == "AdamW":
        return torch.optim.AdamW(groups, lr=settings.rate, betas=settings.betas)
    return torch.optim.SGD(groups, lr=settings.rate, momentum=settings.momentum)


def schedule(optimizer: torch.optim.Optimizer, settings: Optimizer, steps: int) -> LRScheduler:
    """The schedule of the learning rate over a run of `steps` steps."""
    if settings.schedule == "StepLR" and not settings.warmup:
        return StepLR(optimizer, settings.decay_every, settings.decay)
    return LambdaLR(optimizer, lambda step: factor(settings, steps, step))


def factor(settings: Optimizer, steps: int, step: int) -> float:
    """The learning rate of a step, 0-based, as a share of the initial one.

    With s = step - warmup: (step + 1) / (warmup + 1) before s = 0, as LinearLR's; then decay^⌊s / decay_every⌋, as
    StepLR's, or (1 + cos(π s / (steps - warmup))) / 2, as CosineAnnealingLR's.
    """
    since = step - settings.warmup
    if since < 0:
        return (step + 1) / (settings.warmup + 1)
    if settings.schedule == "StepLR":
        return float(settings.decay ** (since // settings.decay_every))
    return (1 + math.cos(math.pi * min(1.0, since / max(1, steps - settings.warmup)))) / 2


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for the weights of convolutions and linear layers, none for biases, γ and β."""
    weights = [
        module.weight
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]
    decayed = set(map(id, weights))
    others = [parameter for parameter in network.parameters() if id(parameter) not in decayed]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
