"""BN213: a layer that is folded already, and still there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import is_initial, statistics
from batchnorm.diagnostics.subject import Missing, Subject
from batchnorm.graph.nonlinearity import bias_of
from batchnorm.passes.estimate import population


class FoldedTwice(Check):
    code = "BN213"
    name = "folded-twice"
    severity = "error"
    symptom = "A network is wrong after a fold, or after its folded weights were loaded."
    why = (
        "The convolution before it has the layer's scale and shift in its weights, and the layer applies them again: "
        "a fold that left the layer, or folded weights in the network as it was trained."
    )
    source = "pytorch #104593, #197539; docs/fold.md"
    needs = ("structure",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        found = subject.structure
        parameters = dict(found.seen.model.named_parameters())
        for path, layer in subject.tracking.items():
            weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
            calls = found.calls_of(layer)
            if weight is None or bias is None or len(calls) != 1:
                continue
            before = found.before(calls[0])
            if len(before.linear) != 1 or not before.directly or before.norms:
                continue
            value = bias_of(before.linear[0])
            own = parameters.get(value.name) if value is not None else None
            if own is None or own.shape != bias.shape:
                continue
            mean, variance = statistics(layer)
            gamma, beta = weight.detach().double(), bias.detach().double()
            factor = gamma / (variance + layer.eps).sqrt()
            expected = beta - mean * factor  # of a convolution that had no bias
            size = expected.abs().max()
            if is_initial(layer):
                continue
            exactly = float(size) > 0 and bool((own.detach().double() - expected).abs().max() < 1e-4 * size)
            if exactly or self._has_its_moments(subject, path, layer):
                home = found.path(value.name.rpartition(".")[0]) if value is not None else ""
                yield self.finding(
                    path,
                    f"{home} makes the mean and deviation of this layer already: it was folded, and is applied again",
                    f'model.set_submodule("{path}", torch.nn.Identity()), or load the weights as trained',
                    before=home,
                )

    @staticmethod
    def _has_its_moments(subject: Subject, path: str, layer: Any) -> bool:
        """Whether what comes to the layer is β and γ², and not what its running statistics say."""
        try:
            found = subject.measured.layers.get(path)
        except Missing:
            return False
        if found is None or subject.measured.live or (apart := found.distance(layer)[0]) < 0.25:
            return False
        gamma, beta = (each.detach().double().cpu() for each in (layer.weight, layer.bias))
        return float(found.gap(beta, gamma.square())[found.varies].square().mean().sqrt()) < min(
            0.35, apart / 3
        )

    def plant(self, case: Case) -> None:
        layer, convolution = case.layer, case.convolution
        with torch.no_grad():
            layer.bias.uniform_(-1, 1)
            population(case.model, case.batches)
            factor = layer.weight / (layer.running_var + layer.eps).sqrt()
            convolution.weight.mul_(factor.view(-1, 1, 1, 1))
            convolution.bias = nn.Parameter(layer.bias - layer.running_mean * factor)
        case.optimizer.add_param_group({"params": [convolution.bias]})
