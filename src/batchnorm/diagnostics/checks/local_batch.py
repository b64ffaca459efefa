"""BN502: small batches in each of several processes."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import is_synchronized
from batchnorm.diagnostics.subject import Subject


class LocalBatch(Check):
    code = "BN502"
    name = "local-batch"
    severity = "warning"
    symptom = "With more processes and the same total batch, training gets worse."
    why = "Plain layers under DistributedDataParallel normalise by the batch of their own process, not by that of all."
    source = "pytorch DistributedDataParallel; Peng et al. 2018, MegDet"
    needs = ("measured",)
    yields_to = ("BN401",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        wrapped = any(type(each).__name__ == "DistributedDataParallel" for each in subject.model.modules())
        if not wrapped:
            return
        measured = subject.measured
        for path, found in measured.layers.items():
            if not is_synchronized(subject.learning[path]) and (found.count < 16 or found.noise >= 0.5):
                yield self.finding(
                    path,
                    f"{found.count} values per channel in a process: the statistics of its batch move its outputs by "
                    f"{found.noise:.0%} of a standard deviation",
                    "model, _ = bn.convert_sync(model), before it is wrapped",
                    values=found.count,
                    noise=found.noise,
                )

    def plant(self, case: Case) -> None:
        """Only where there are several processes: the tests have their own."""
        raise NotImplementedError
