"""BN101: a bias that normalization subtracts again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject
from batchnorm.graph.nonlinearity import bias_of
from batchnorm.graph.sources import NotLinear
from batchnorm.passes.fold.normalization import Left
from batchnorm.passes.fold.plan import Tensors
from batchnorm.passes.strip_bias import Kept, biases_before


class RedundantBias(Check):
    code = "BN101"
    name = "redundant-bias"
    severity = "info"
    symptom = "Parameters that get a gradient of 0 and do nothing, and a tensor more to add."
    why = "BN(Wx + b) is BN(Wx): the mean of the batch has b in it. β takes its place."
    source = "Ioffe & Szegedy 2015, section 3.2; Pytorch-UNet PR 325, keras-cv #629"
    needs = ("structure",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        found = subject.structure
        tensors = Tensors(found.seen.model, found.seen)
        for path, layer in subject.layers.items():
            calls = found.calls_of(layer)
            if not calls or not any(
                made is not None and made.kind == "parameter"
                for call in calls
                for linear in found.before(call).linear
                for made in [bias_of(linear)]
            ):
                continue
            try:
                homes = {found.path(home) for call in calls for home in biases_before(call, tensors)}
            except (Kept, Left, NotLinear):
                continue
            names = ", ".join(sorted(homes))
            yield self.finding(
                path,
                f"the bias of {names} is subtracted again with the batch's mean",
                "bn.strip_bias(model, images), or bias=False",
                before=names,
            )

    def plant(self, case: Case) -> None:
        case.convolution.bias = nn.Parameter(torch.zeros(case.convolution.out_channels))
