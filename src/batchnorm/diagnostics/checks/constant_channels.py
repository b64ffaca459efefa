"""BN406: channels that never vary."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.diagnostics.check import Case, Check, plural
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.passes.estimate import population


class ConstantChannels(Check):
    code = "BN406"
    name = "constant-channels"
    severity = "warning"
    symptom = "Channels whose output is β whatever the image; a variance of 0 in the checkpoint."
    why = (
        "What comes to the layer in a channel is one number: filters that are 0, units that died before it, an input "
        "channel that is empty. 1 / sqrt(eps), 316, multiplies the smallest change of it in evaluation."
    )
    source = "pytorch #1402; Ioffe & Szegedy 2015, algorithm 1 (eps)"
    needs = ("measured",)
    follows = ("BN407",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        measured = subject.measured
        for path, found in measured.layers.items():
            dead = (~found.varies).nonzero().flatten().tolist()
            enough = sum(each.count for each in found.arrivals) > 8
            if dead and enough:
                yield self.finding(
                    path,
                    f"{plural(len(dead), 'channel')} of {found.mean.numel()} never vary (the first is {dead[0]})",
                    "look at the weights before it; prune them (docs/pruning.md)",
                    severity="info" if subject.gets_activations(path) else "warning",
                    channels=len(dead),
                    first=dead[0],
                )

    def plant(self, case: Case) -> None:
        with torch.no_grad():
            case.convolution.weight[0] = 0
        population(case.model, case.batches)
