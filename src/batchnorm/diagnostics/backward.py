"""How often each layer moves its running statistics in one forward and backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from batchnorm.diagnostics.layer import batches_tracked
from batchnorm.diagnostics.runs import Runs
from batchnorm.graph.observation import tensors_of


@dataclass(frozen=True)
class Updates:
    """By path, how often a layer was called in the forward pass, and has counted a batch in both."""

    forward: Mapping[str, int]
    counted: Mapping[str, int]


def updates(runs: Runs, layers: Mapping[str, Any]) -> Updates | str:
    """Of the first batch, in training mode. Returns: what was counted, or why nothing was."""
    if any(parameter._post_accumulate_grad_hooks for parameter in runs.model.parameters()):
        return "hooks of parameters act in a backward pass: an optimizer, perhaps"
    counting = {path: layer for path, layer in layers.items() if batches_tracked(layer) is not None}
    called = dict.fromkeys(counting, 0)

    def hook_of(path: str) -> Any:
        def hook(*_: Any) -> None:
            called[path] += 1

        return hook

    try:
        with runs.unharmed():
            before = {path: int(layer.num_batches_tracked) for path, layer in counting.items()}
            runs.model.train()
            for path, layer in counting.items():
                layer.register_forward_hook(hook_of(path))  # taken away again by unharmed()
            made = tensors_of(runs.call(runs.batches[0], with_gradients=True))
            losses = [each.float().mean() for each in made if each.requires_grad and each.is_floating_point()]
            if not losses:
                return "the model returns nothing that has a gradient"
            forward = dict(called)
            torch.stack([loss.cpu() for loss in losses]).sum().backward()
            counted = {
                path: int(layer.num_batches_tracked) - before[path] for path, layer in counting.items()
            }
    except Exception as why:
        return f"a backward pass fails: {type(why).__name__}: {why}".splitlines()[0]
    return Updates(forward, counted)
