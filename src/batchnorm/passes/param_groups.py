"""`param_groups(model, weight_decay)`: which parameters decay, by what they are parameters of."""

from __future__ import annotations

from typing import Any

from torch import nn

from batchnorm.graph.modules import is_norm


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    normalization: float = 0.0,
    biases: float = 0.0,
    scales: float | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """The parameters of `model` in groups for an optimizer: normalization, biases, and all others.

    Decaying the weight of a layer before batch normalization is a change of its learning rate, as the scale of its
    output does not matter; decaying γ and β is decay of the function itself, and is mostly left out (He et al. 2019,
    "Bag of Tricks", section 3.1). Each parameter that requires a gradient is in exactly one group.

    Args:
        model: any module.
        weight_decay: of all parameters but those of normalization layers and biases.
        normalization: the decay of weights and biases of normalization layers of any library: batch, layer, group,
            instance, RMS.
        biases: that of the biases of other modules.
        scales: that of γ, the `weight` of normalization layers, as a group of its own, to be made sparse for pruning
            say; None: γ is in the group of normalization.
        options: of every group, as lr=0.1.

    Returns: up to four groups, dictionaries with "params", "weight_decay", "name" and the options; for the optimizers
        of torch and timm.

    Raises:
        ValueError: a parameter is one of a normalization layer and of another module, and would decay differently.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> groups = bn.param_groups(model, weight_decay=1e-4)
        >>> [(group["name"], len(group["params"]), group["weight_decay"]) for group in groups]
        [('weights', 1, 0.0001), ('normalization', 2, 0.0), ('biases', 1, 0.0)]
        >>> optimizer = torch.optim.SGD(groups, lr=0.1)
    """
    decays = {"weights": weight_decay, "normalization": normalization, "biases": biases}
    if scales is not None:
        decays["scales"] = scales
    groups: dict[nn.Parameter, tuple[str, str]] = {}  # the group, and the path
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            group = "normalization" if is_norm(module) else "biases" if _is_bias(name) else "weights"
            if group == "normalization" and name == "weight" and scales is not None:
                group = "scales"
            place = f"{path}.{name}".lstrip(".")
            before, first = groups.setdefault(parameter, (group, place))
            if before != group and decays[before] != decays[group]:
                raise ValueError(
                    f"{first} and {place} are one parameter, of {before} and of {group}, which decay differently: give "
                    "both the same decay"
                )
    found = [
        {
            "params": [parameter for parameter, (group, _) in groups.items() if group == name],
            "weight_decay": decay,
            "name": name,
            **options,
        }
        for name, decay in decays.items()
    ]
    return [group for group in found if group["params"]]


def _is_bias(name: str) -> bool:
    """Of torch's names: bias; bias_ih_l0 of recurrent layers, in_proj_bias and bias_k of attention."""
    return name.startswith("bias") or name.endswith("bias")
