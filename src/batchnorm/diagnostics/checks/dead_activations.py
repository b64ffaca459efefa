"""BN407: channels that the activation behind never lets through."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.diagnostics.check import Case, Check, plural
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.estimate import population


class DeadActivations(Check):
    code = "BN407"
    name = "dead-activations"
    severity = "warning"
    symptom = "Channels that are 0 for every image, and get no gradient."
    why = (
        "β is so far below 0 that γ·x̂ + β is negative for all that was seen, and what follows is 0 there: no "
        "gradient comes back that could change it."
    )
    source = "Maas et al. 2013; torch-audit (dead filters)"
    needs = ("measured", "structure")
    yields_to = ("BN209", "BN406")

    def find(self, subject: Subject) -> Iterator[Finding]:
        for path, found in subject.measured.layers.items():
            layer = subject.learning[path]
            cut_off = subject.structure.cut_off(layer)
            if cut_off is None:
                continue
            high, low = (
                torch.stack([getattr(each, name) for each in found.arrivals])
                for name in ("highest", "lowest")
            )
            weight, bias = (
                [] if each is None else each.detach().double().cpu().flatten()
                for each in (layer.weight, layer.bias)
            )
            if not len(weight) or not len(bias):
                continue
            top = torch.where(weight > 0, weight * high.amax(0), weight * low.amin(0)) + bias
            dead = ((top < cut_off) & found.varies).nonzero().flatten().tolist()
            if dead:
                # a rare value may not have come yet
                values = sum(each.count for each in found.arrivals)
                sure = values >= 2000 or bool((bias < cut_off - 5 * weight.abs())[dead].all())
                yield self.finding(
                    path,
                    f"{plural(len(dead), 'channel')} of {len(top)} never above {cut_off:g} in {values:,} values, where "
                    f"the activation behind begins (the first is {dead[0]})",
                    "prune them (docs/pruning.md), or a lower rate; set β back to 0",
                    severity="warning" if sure else "info",
                    channels=len(dead),
                    first=dead[0],
                )

    def plant(self, case: Case) -> None:
        with torch.no_grad():
            case.layer.bias[3] = -100
        population(case.model, case.batches)
