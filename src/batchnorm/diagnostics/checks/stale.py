"""BN405: running statistics that are not those of the data."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.layer import averages, batches_tracked, is_initial
from batchnorm.diagnostics.subject import Missing, Subject

_TOLERATED = 0.25  # of an output's standard deviation: what moving averages of a training that ends well have

_MEASURED = 20  # batches, of which statistics may have been measured, rather than followed


class Stale(Check):
    code = "BN405"
    name = "stale-statistics"
    severity = "warning"
    symptom = "eval() far worse than train() on the same data."
    why = (
        "What comes to the layer has another mean or variance than its running statistics say: weights that have "
        "changed since (a last step with a high rate, an average of models, pruning, quantization), data of another "
        "domain or preprocessing, an average too short for the noise, a file that does not fit."
    )
    source = (
        "Ioffe & Szegedy 2015, algorithm 2, line 10; pytorch #4741, #5406, #4253; Person_reID #218; GACNet #8"
    )
    needs = ("measured",)
    follows = ("BN106", "BN209", "BN210", "BN406", "BN407", "BN403", "BN404", "BN504")
    yields_to = (
        "BN108",
        "BN201",
        "BN202",
        "BN204",
        "BN206",
        "BN207",
        "BN208",
        "BN210",
        "BN213",
        "BN214",
        "BN215",
    )

    def find(self, subject: Subject) -> Iterator[Finding]:
        measured = subject.measured
        if measured.live:
            return
        at_first = 0.0  # the gap of the first layer, of which the others may have some
        first = True
        for path, found in measured.layers.items():
            layer = subject.learning[path]
            if is_initial(layer):
                continue
            gap, by_chance = found.distance(layer)
            if gap > max(_TOLERATED, 3 * by_chance, at_first / 2):
                at_first = gap if first else at_first
                cause, fix = self._cause(subject, path, first)
                yield self.finding(
                    path,
                    f"in evaluation its outputs are {gap:.2f} standard deviations from those in training "
                    f"({by_chance:.2f} by chance): {cause}",
                    fix,
                    gap=gap,
                    by_chance=by_chance,
                )
            first = False

    @staticmethod
    def _cause(subject: Subject, path: str, first: bool) -> tuple[str, str]:
        layer = subject.learning[path]
        again = "bn.population(model, batches)"
        if (calls := max(subject.measured.calls.get(path, [1]))) > 1:
            return (
                f"it is called {calls} times with a batch, each time with other inputs",
                "a layer for each call",
            )
        if any(layer in set(each.modules()) for each in averages(subject.model)):
            return (
                "they are those of the last model that was averaged, with other weights",
                f"{again}, or bn.average(model)",
            )
        seen, momentum = batches_tracked(layer), layer.momentum
        if seen and seen > _MEASURED and momentum and momentum < 1 and (1 - momentum) ** seen > 0.05:
            share = (1 - momentum) ** seen
            return f"{share:.0%} of them are the 0 and 1 that they began with (momentum {momentum:g})", again
        if _after_dropout(subject, path):
            return (
                "dropout before it makes training's variance another",
                f"{again}, after training without it",
            )
        if first:
            return (
                "the data have another distribution (domain, preprocessing), or the weights before it have changed",
                f"the same preprocessing, or {again}",
            )
        if (layer.momentum or 0) >= 0.5:
            return f"they are those of the last batches (momentum {layer.momentum:g})", again
        return "the weights before it have changed since", again

    def fix(self, subject: Subject, finding: Finding) -> str:
        return subject.measure_again(finding.layer)

    def plant(self, case: Case) -> None:
        case.layer.running_mean.add_(case.layer.running_var.sqrt())


def _after_dropout(subject: Subject, path: str) -> bool:
    try:
        found = subject.structure
    except Missing:
        return False
    befores = [found.before(call) for call in found.calls_of(subject.learning[path])]
    return any(each.dropped or each.dropped_before for each in befores)
