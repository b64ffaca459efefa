"""`model, report = zero_init_residual(model, *inputs)`: every residual block begins as the identity."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from batchnorm.graph.modules import normalizes
from batchnorm.graph.observation import observe
from batchnorm.graph.residual import ends
from batchnorm.passes.fold.proof import copy_of, detached
from batchnorm.passes.report import LayerReport, Report

Model = TypeVar("Model", bound=nn.Module)


def zero_init_residual(model: Model, *inputs: Any, **keywords: Any) -> tuple[Model, Report]:
    """Set γ = 0 in the last normalization of each residual branch, in place: F(x) + x begins as x.

    For a new network, before it is trained: deep ones are easier to train then, above all with large batches (Goyal et
    al. 2017, section 5.1). It is the option of that name of torchvision's ResNets and `zero_init_last` of timm's, for
    any network: the branches are found by running it on example inputs, on a copy, in evaluation mode. A shortcut that
    has a normalization of its own keeps its γ; so does a layer with ReLU behind it, through which no gradient would
    come at zero.

    Args:
        model: any module with batch normalization of torch, timm or ours.
        inputs: of its forward, for example.
        keywords: further inputs, by name.

    Returns: `model` itself, and a Report: "zeroed", or "left alone" and why.

    Example:
        >>> import torch, torchvision, batchnorm as bn
        >>> model, report = bn.zero_init_residual(torchvision.models.resnet18(), torch.randn(1, 3, 64, 64))
        >>> report.count("zeroed"), report["layer1.0.bn2"].outcome
        (8, 'zeroed')
    """
    given, named = detached((inputs, keywords))
    running = copy_of(model).eval()
    seen = observe(running, *given, **named)
    last = {call.module for call in ends(seen)}
    numbers = {module: len(seen.calls_of(module)) for module in last}
    at_end = [call.module for call in ends(seen)]
    seen.forget()
    rows, zeroed = [], []
    for path, module in running.named_modules():
        if not normalizes(module):
            continue
        weight = model.get_submodule(path)._parameters.get("weight")
        why = None if module in last else "ends no residual branch"
        if why is None and at_end.count(module) < numbers[module]:
            why = "is called elsewhere too, not only at the end of a branch"
        if why is None and not isinstance(weight, Tensor):
            why = "has no weight of its own (affine=False, or frozen)"
        if why is None and isinstance(weight, Tensor) and not weight.requires_grad:
            why = "is frozen: its weight requires no gradient, and would stay 0"
        rows.append(LayerReport(path, "zeroed") if why is None else LayerReport(path, "left alone", why=why))
        if why is None and isinstance(weight, Tensor):
            zeroed.append(weight)
    with torch.no_grad():
        for weight in zeroed:
            weight.zero_()
    return model, Report(tuple(rows))
