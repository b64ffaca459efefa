"""BN702: the activation memory that `bn.save_memory` would spare."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.runs import Runs
from batchnorm.diagnostics.subject import Missing, Subject
from batchnorm.graph.activation_memory import saved_bytes
from batchnorm.passes.save_memory import save_memory


class SparedMemory(Check):
    code = "BN702"
    name = "spared-memory"
    severity = "info"
    symptom = "A batch that does not fit into memory."
    why = (
        "In convolution, normalization and activation every activation is saved twice for the backward pass: as the "
        "layer's input, and as the next convolution's, which is one pass over memory away. Measured: the bytes that "
        "autograd saves in a forward pass of a copy of the model, as it is and after bn.save_memory; gradients are "
        "equal to the bit."
    )
    source = "docs/memory.md"
    needs = ("measured",)
    on_request = True

    def find(self, subject: Subject) -> Iterator[Finding]:
        if not subject.layers:
            return
        now, then = _measured(subject.runs)
        if then < 0.95 * now:
            yield self.finding(
                "",
                f"a forward pass saves {now / 1e6:.3g} MB of activations, after bn.save_memory {then / 1e6:.3g} MB",
                "model, report = bn.save_memory(model)",
                megabytes=now / 1e6,
                spared=then / 1e6,
            )

    def plant(self, case: Case) -> None:
        """No bug: a network that keeps all."""
        case.path = ""


def _measured(runs: Runs) -> tuple[int, int]:
    """Bytes that a forward pass of a copy saves: as it is, and after save_memory. Raises: Missing."""
    try:
        model = deepcopy(runs.model).train()
        anyway = [*model.parameters(), *model.buffers()]
        now = saved_bytes(lambda: runs.forward(model, runs.batches[0]), anyway)
        save_memory(model)
        return now, saved_bytes(lambda: runs.forward(model, runs.batches[0]), anyway)
    except Exception as why:
        raise Missing(
            f"a copy of the model could not be run: {type(why).__name__}: {why}".splitlines()[0]
        ) from why
