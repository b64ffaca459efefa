"""BN410: outputs in evaluation that depend on the other examples."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class LeakingExamples(Check):
    code = "BN410"
    name = "leaking-examples"
    severity = "error"
    symptom = "A prediction changes with the batch it is made in; the score depends on the batch size."
    why = (
        "In evaluation a layer must use running statistics. This one normalises by the batch: "
        "track_running_stats=False, F.batch_norm(training=True), a mode that a forward sets itself; or something "
        "else in it mixes examples."
    )
    source = (
        "Wu & Johnson 2021, Rethinking batch in BatchNorm, section 6; warpem/miss-alignment #6; torchtest2"
    )
    follows = ("BN601",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        again = "track_running_stats=True, then train or bn.population(model, batches)"
        without = [
            path for path, layer in subject.layers.items() if getattr(layer, "running_mean", 0) is None
        ]
        moves = (
            {leak.path: leak.change for leak in subject.leaks} if subject.runs.batches or not without else {}
        )
        for path in without:
            change = (
                f": an example's output moves by {moves[path]:.0%} with other neighbours"
                if path in moves
                else ""
            )
            yield self.finding(
                path,
                f"has no running statistics, and normalises by the batch in evaluation too{change}",
                again,
                change=moves.get(path, float("nan")),
            )
        for path in moves.keys() - set(without):
            yield self.finding(
                path,
                f"in evaluation an example's output moves by {moves[path]:.0%} with other neighbours in its batch",
                "F.batch_norm(..., training=self.training), and no mode set in a forward",
                change=moves[path],
            )

    def plant(self, case: Case) -> None:
        layer = case.layer
        layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
        layer.num_batches_tracked = None
