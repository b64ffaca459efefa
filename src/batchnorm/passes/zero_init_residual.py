"""`model, report = zero_init_residual(model, *inputs)`: every residual block begins as the identity."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from batchnorm.graph.modules import normalizes, refuse_lazy
from batchnorm.graph.observation import as_it_was, observe, tensors_of
from batchnorm.graph.residual import ends
from batchnorm.passes.fold.proof import copy_of, detached
from batchnorm.passes.report import LayerReport, Report

Model = TypeVar("Model", bound=nn.Module)


def zero_init_residual(model: Model, *inputs: Any, **keywords: Any) -> tuple[Model, Report]:
    """Set γ = 0 in the last normalization of each residual branch, in place: F(x) + x begins as x.

    For a new network, before it is trained: deep ones are easier to train then, above all with large batches (Goyal et
    al. 2017, section 5.1). It is the option of that name of torchvision's ResNets and `zero_init_last` of timm's, for
    any network: the branches are found by running it on example inputs, on a copy, in evaluation mode. A shortcut that
    has a normalization of its own keeps its γ; so does a layer whose γ would get no gradient at zero, which is tried:
    one with ReLU behind it, or a factor that is 0 itself.

    Args:
        model: any module with batch normalization of torch, timm or ours.
        inputs: of its forward, for example.
        keywords: further inputs, by name.

    Returns: `model` itself, and a Report: "zeroed", or "left alone" and why.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: it has lazy layers. What its forward raises is passed on; then nothing has been changed.

    Example:
        >>> import torch, torchvision, batchnorm as bn
        >>> model, report = bn.zero_init_residual(torchvision.models.resnet18(), torch.randn(1, 3, 64, 64))
        >>> report.count("zeroed"), report["layer1.0.bn2"].outcome
        (8, 'zeroed')
    """
    if not isinstance(cast(object, model), nn.Module):
        raise TypeError(f"zero_init_residual takes a torch.nn.Module, not {type(model).__name__}")
    refuse_lazy(model)
    given, named = detached((inputs, keywords))
    running = copy_of(model).eval()
    seen = observe(running, *given, **named)
    at_end = [call.module for call in ends(seen)]
    numbers = {module: len(seen.calls_of(module)) for module in at_end}
    seen.forget()
    why: dict[str, str] = {}
    found: dict[str, Tensor] = {}
    for path, module in running.named_modules():
        if not normalizes(module):
            continue
        weight = module._parameters.get("weight")
        if module not in at_end:
            why[path] = "ends no residual branch"
        elif at_end.count(module) < numbers[module]:
            why[path] = "is called elsewhere too, not only at the end of a branch"
        elif not isinstance(weight, Tensor):
            why[path] = "has no weight of its own (affine=False, or frozen)"
        elif not weight.requires_grad:
            why[path] = "is frozen: its weight requires no gradient, and would stay 0"
        elif sum(weight is each for one in running.modules() for each in one._parameters.values()) > 1:
            why[path] = "has a weight that is another layer's too"
        else:
            found[path] = weight
    for path in _without_gradient(running, given, named, found):
        del found[path]
        why[path] = "would get no gradient at 0, as something behind it is 0 then too"
    with torch.no_grad():
        for path in found:
            cast(Tensor, model.get_submodule(path).weight).zero_()
    rows = [
        LayerReport(path, "zeroed") if path in found else LayerReport(path, "left alone", why=why[path])
        for path, module in model.named_modules()
        if path in found or path in why
    ]
    return model, Report(tuple(rows))


def _without_gradient(
    running: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], weights: dict[str, Tensor]
) -> list[str]:
    """The paths of those weights that would get no gradient if all were 0; of a copy, whose weights are changed."""
    left = dict(weights)
    dead: list[str] = []
    while left:
        with torch.no_grad():
            for path, weight in weights.items():
                weight.fill_(0.0 if path in left else 1.0)
        with torch.inference_mode(False), torch.enable_grad(), as_it_was(running):
            generator = torch.Generator().manual_seed(0)
            returned = tensors_of(running(*inputs, **keywords))
            parts = [
                (each * torch.randn(each.shape, generator=generator).to(each)).sum()
                for each in returned
                if each.requires_grad
            ]
            if not parts:
                return dead  # nothing can be told, as of detections that are no function of the weights
            total = torch.stack([each.real.double() for each in parts]).sum()
            gradients = torch.autograd.grad(total, list(left.values()), allow_unused=True)
        lost = [
            path
            for path, gradient in zip(left, gradients, strict=True)
            if gradient is None or not bool((gradient != 0).any())
        ]
        if not lost:
            return dead
        dead += lost
        for path in lost:
            del left[path]
    return dead
