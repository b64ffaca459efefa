"""BN302: weight decay on γ and β."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics.check import Case, Check, plural
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject


class WeightDecay(Check):
    code = "BN302"
    name = "weight-decay"
    severity = "info"
    symptom = "None by itself: a choice."
    why = (
        "Against: decay on the weights before a layer acts as a larger rate, as their scale does not matter; on γ and "
        "β it is a penalty on what the network computes, and takes channels to 0. For: it keeps γ small, as slimming "
        "wants; the paper decays what it decays without saying, and published recipes differ."
    )
    source = "van Laarhoven 2017; He et al. 2019, Bag of tricks (no bias decay); pytorch #1402; slimmable #15"
    needs = ("optimizer",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        assert subject.optimizer is not None
        decayed = {
            id(each): float(group["weight_decay"])
            for group in subject.optimizer.param_groups
            if group.get("weight_decay", 0)
            for each in group["params"]
        }
        layers = [
            (path, decayed[id(each)])
            for path, layer in subject.layers.items()
            for each in layer.parameters(recurse=False)
            if id(each) in decayed
        ]
        if layers:
            paths = list(dict.fromkeys(path for path, _ in layers))
            number = len(paths)
            yield self.finding(
                paths[0] if number == 1 else "",
                f"weight decay of {layers[0][1]:g} acts on γ and β of {plural(number, 'layer')}",
                "SGD(bn.param_groups(model, weight_decay), lr=...) leaves them out",
                layers=number,
                decay=layers[0][1],
                first=paths[0],
            )

    def plant(self, case: Case) -> None:
        for group in case.optimizer.param_groups:
            group["params"] = [each for each in group["params"] if each is not case.layer.weight]
        case.optimizer.add_param_group({"params": [case.layer.weight], "weight_decay": 1e-4})
