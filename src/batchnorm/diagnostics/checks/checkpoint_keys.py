"""BN604: a checkpoint that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject

_BUFFERS = ("running_mean", "running_var")


class CheckpointKeys(Check):
    code = "BN604"
    name = "checkpoint-keys"
    severity = "error"
    symptom = "A model that was loaded with strict=False is bad in evaluation; or load_state_dict raises."
    why = (
        "Parameters and buffers whose names or shapes do not fit stay as they were: 0 and 1 for running statistics. "
        "Files that were averaged, exported or written by other libraries leave buffers out; those of before 2018 "
        "have no num_batches_tracked, which torch fills in."
    )
    source = "pytorch #8430; docs/bridges.md"
    needs = ("state",)

    def find(self, subject: Subject) -> Iterator[Finding]:
        assert subject.state is not None
        state = {str(key): value for key, value in subject.state.items()}
        for path, layer in subject.layers.items():
            prefix = f"{path}." if path else ""
            own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
            missing = [name for name in own if prefix + name not in state]
            counter = "num_batches_tracked" in missing
            missing = [name for name in missing if name != "num_batches_tracked"]
            wrong = [
                name
                for name, each in own.items()
                if prefix + name in state and tuple(state[prefix + name].shape) != tuple(each.shape)
            ]
            if missing:
                near = _elsewhere(prefix, missing[0], state)
                yield self.finding(
                    path,
                    f"the checkpoint has no {', '.join(missing)} for it"
                    + (f"; it has {near}" if near else ""),
                    "rename the keys; bn.bridges reads other libraries'; bn.population(model, batches) for statistics",
                    missing=len(missing),
                )
            elif counter:
                yield self.finding(
                    path,
                    "the checkpoint does not count its batches",
                    "nothing with a momentum; with momentum=None the average begins again",
                    severity="info",
                )
            if wrong:
                sizes = f"{tuple(state[prefix + wrong[0]].shape)} for {tuple(own[wrong[0]].shape)}"
                yield self.finding(
                    path,
                    f"the checkpoint's {', '.join(wrong)} have other shapes: {sizes}",
                    "the width it was trained with",
                )

    def plant(self, case: Case) -> None:
        case.options["state"] = {
            key: value
            for key, value in case.model.state_dict().items()
            if key not in [f"{case.path}.{name}" for name in _BUFFERS]
        }


def _elsewhere(prefix: str, name: str, state: dict[str, Any]) -> str:
    """A key that ends as the missing one does, behind another prefix."""
    for key in state:
        if key != prefix + name and (
            key.endswith("." + prefix + name) or (prefix + name).endswith("." + key)
        ):
            return key
    return ""
