"""Trace the forward of a whole model, down to torch's modules and our layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from batchnorm.graph.modules import is_ours
from batchnorm.graph.trace import Trace, Untraceable, parameters, trace


def whole_trace(
    model: nn.Module, training: bool, inputs: Sequence[str] | None = None, layers_are_leaves: bool = False
) -> Trace:
    """What `model` calls, if that depends on nothing but the types of its inputs, which are tensors.

    Args:
        model: any module.
        training: the mode to trace it in.
        inputs: the names of those arguments of its forward that are given; None: all that have no default.
        layers_are_leaves: whether the forward of a batch normalization of somebody else's class is left out too.

    Raises: Untraceable.
    """
    known = parameters(model)
    if known is None:
        if not isinstance(model, nn.Sequential):
            raise Untraceable(f"the forward of {type(model).__name__} takes *args or **kwargs")
        known = {}
    if inputs is None:
        inputs = [name for name, each in known.items() if each.default is each.empty]
    inner = {
        each
        for each in model.modules()
        if each is not model
        and not _is_leaf(each)
        and not (layers_are_leaves and isinstance(each, nn.modules.batchnorm._BatchNorm))
    }
    return trace(model, dict.fromkeys(inputs, Tensor), training=training, transparent=inner)


def _is_leaf(module: nn.Module) -> bool:
    torch_s = type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
    return torch_s or is_ours(module)
