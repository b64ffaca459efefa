"""How often each layer moves its running statistics in one forward and backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from batchnorm.diagnostics.runs import Runs


@dataclass(frozen=True)
class Updates:
    """By path, how often a layer was called in the forward pass, in the backward pass, and has counted a batch."""

    forward: Mapping[str, int]
    backward: Mapping[str, int]
    counted: Mapping[str, int]


def updates(runs: Runs, layers: Mapping[str, Any]) -> Updates | str:
    """Of the first batch, in training mode. Returns: what was counted, or why nothing was."""
    if any(parameter._post_accumulate_grad_hooks for parameter in runs.model.parameters()):  # type: ignore[attr-defined]
        return "hooks of parameters act in a backward pass: an optimizer, perhaps"
    counts = {path: (layer, getattr(layer, "num_batches_tracked", None)) for path, layer in layers.items()}
    counts = {path: each for path, each in counts.items() if each[1] is not None}
    called = {"forward": dict.fromkeys(counts, 0), "backward": dict.fromkeys(counts, 0)}
    phase = "forward"

    def hook_of(path: str) -> Any:
        def hook(*_: Any) -> None:
            called[phase][path] += 1

        return hook

    try:
        with runs.unharmed():
            before = {path: int(count) for path, (_, count) in counts.items()}
            runs.model.train()
            for path, (layer, _) in counts.items():
                layer.register_forward_hook(hook_of(path))  # taken away again by unharmed()
            made = [each for each in tree_leaves(runs.call(runs.batches[0])) if isinstance(each, Tensor)]
            losses = [each.float().mean() for each in made if each.requires_grad and each.is_floating_point()]
            if not losses:
                return "the model returns nothing that has a gradient"
            phase = "backward"
            torch.stack([loss.cpu() for loss in losses]).sum().backward()
            counted = {path: int(layer.num_batches_tracked) - before[path] for path, (layer, _) in counts.items()}
    except Exception as why:
        return f"a backward pass fails: {type(why).__name__}: {why}".splitlines()[0]
    return Updates(called["forward"], called["backward"], counted)
