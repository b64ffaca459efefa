"""BN209: channels that the layer switches off."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.diagnostics.check import Case, Check, plural
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class DeadChannels(Check):
    code = "BN209"
    name = "dead-channels"
    severity = "warning"
    symptom = "Channels that compute nothing, and are paid for."
    why = (
        "γ is 0, or so small beside the others' that the channel is its β: weight decay on γ takes it there, and "
        "behind a ReLU with β below 0 no gradient brings it back. A whole layer of zeros is an initialisation "
        "(zero_init_residual), and left out."
    )
    source = "Liu et al. 2017 (network slimming); pytorch #1402; docs/pruning.md"

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, layer in subject.layers.items():
            weight = getattr(layer, "weight", None)
            if weight is None or not bool((weight != 0).any()):
                continue
            size = weight.detach().double().abs().flatten()
            usual = float(size[size > 0].median())
            dead = (size <= 1e-6 * usual).nonzero().flatten().tolist()
            if dead:
                yield self.finding(
                    path,
                    f"{plural(len(dead), 'channel')} of {size.numel()} with γ at 0 ({_listed(dead)})",
                    "prune them (docs/pruning.md), or bn.param_groups(model, weight_decay): none on γ",
                    channels=len(dead),
                    first=dead[0],
                )

    def plant(self, case: Case) -> None:
        with torch.no_grad():
            case.layer.weight[1] = 0


def _listed(channels: list[int]) -> str:
    return ", ".join(map(str, channels[:5])) + (", …" if len(channels) > 5 else "")
