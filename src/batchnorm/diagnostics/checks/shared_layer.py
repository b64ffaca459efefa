"""BN108: one layer at two places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import nn

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Missing, Subject


class SharedLayer(Check):
    code = "BN108"
    name = "shared-layer"
    severity = "warning"
    symptom = "Good in training, where each place has its own batch's statistics; bad in evaluation."
    why = (
        "There is one set of running statistics, a mixture of what comes to both places, which is right for neither. "
        "The same for one layer on two domains."
    )
    source = "pytorch #1738, #8985, #48929; keras #8794"

    def find(self, subject: Subject) -> Iterator[Finding]:
        places: dict[nn.Module, list[str]] = {}
        for path, module in subject.model.named_modules(remove_duplicate=False):
            if module in subject.learning.values():
                places.setdefault(module, []).append(path)
        for path, layer in subject.learning.items():
            names = places[layer]
            calls, alike = self._calls(subject, path, layer)
            if len(names) < 2 and calls < 2:
                continue
            where = " and ".join(names) if len(names) > 1 else f"called {calls} times in a pass"
            yield self.finding(
                path,
                f"is one layer{' at' if len(names) > 1 else ','} {where}, with one set of running statistics"
                + (", of inputs that are alike" if alike else ""),
                'a layer for each place, or "with bn.domain(name)" around each call',
                severity="info" if alike else "warning",
                calls=max(calls, len(names)),
            )

    @staticmethod
    def _calls(subject: Subject, path: str, layer: nn.Module) -> tuple[int, bool]:
        """In the forward pass of one batch, and whether what comes is alike; one call where that cannot be seen.

        By what was measured; without batches by the weights before it: a network that is called for two images has the
        same at both calls.
        """
        try:
            found = subject.structure
        except Missing:
            return 1, False
        calls = found.calls_of(layer)
        if len(calls) < 2:
            return len(calls), False
        with suppress(Missing):
            if (measured := subject.measured.layers.get(path)) is not None:
                return len(calls), not measured.differs_by_call
        before = [
            [each.name for linear in found.before(call).linear for each in linear.reads if each.name]
            for call in calls
        ]
        return len(calls), bool(before[0]) and all(each == before[0] for each in before)

    def plant(self, case: Case) -> None:
        """Through a second call, on noise."""
        layer = case.layer

        def call_again(*_: object) -> None:
            layer(torch.randn(4, layer.num_features, 5, 5))

        case.model.register_forward_hook(call_again)
