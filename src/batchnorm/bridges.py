"""Layers of other libraries, read into ours and written back: the same function, in their names and conventions.

    library      weight, bias          statistics                    momentum m  eps    and
    keras        gamma, beta           moving_mean, moving_variance  old·m       1e-3
    flax         params: scale, bias   batch_stats: mean, var        old·m       1e-5
    tf-slim      gamma or none, beta   moving_mean, moving_variance  old·m       1e-3
    mxnet        gamma, beta           moving_mean, moving_var       old·m       1e-3   fix_gamma
    caffe        Scale: two blobs      BatchNorm: three blobs        old·m       1e-5   ÷ the third, a factor
    inplace_abn  weight, bias          running_mean, running_var     new·m       1e-5   |weight| + eps; an activation
    frozen       weight, bias          running_mean, running_var     none        1e-5   statistics are fixed
    timm, torch  weight, bias          running_mean, running_var     new·m       1e-5

In evaluation the layers agree to rounding. Trained further, ours averages unbiased variances as torch's does, where
Keras, flax, TF-slim and MXNet average biased ones, smaller by a factor of (n - 1)/n.

Example:
    >>> import torch, batchnorm as bn
    >>> layer = bn.bridges.read("keras", {"moving_mean": torch.zeros(4), "moving_variance": torch.ones(4)})
    >>> values, settings = bn.bridges.write("flax", layer)
    >>> settings
    {'momentum': 0.99, 'epsilon': 0.001}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import layers
from batchnorm.layers import _BatchNorm
from batchnorm.statistics.population import Population

_STATISTICS = ("mean", "variance")
_RANKS = {None: layers.BatchNorm, 1: layers.BatchNorm1d, 2: layers.BatchNorm2d, 3: layers.BatchNorm3d}


@dataclass(frozen=True)
class Library:
    """The names and conventions of a library.

    names: of weight, bias, mean and variance there; with other ones that are understood.
    eps: its default.
    momentum: its default, and "momentum" or what it calls it; None where statistics are fixed.
    keeps: whether its momentum is the share of the old average, and not that of the new value.
    """

    names: dict[str, tuple[str, ...]]
    eps: float
    momentum: float | None
    keeps: bool
    calls_momentum: str = "momentum"
    calls_eps: str = "eps"


def _library(
    weight: str, bias: str, mean: str, variance: str, *, eps: float, momentum: float | None, **settings: Any
) -> Library:
    names = {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
    return Library(
        {part: tuple(each.split()) for part, each in names.items()},
        eps,
        momentum,
        settings.pop("keeps", True),
        **settings,
    )


_TORCH = ("weight", "bias", "running_mean", "running_var")
_MOVING = ("gamma", "beta", "moving_mean", "moving_variance")
LIBRARIES: dict[str, Library] = {
    "keras": _library(*_MOVING, eps=1e-3, momentum=0.99, calls_eps="epsilon"),
    "flax": _library("scale", "bias", "mean", "var", eps=1e-5, momentum=0.99, calls_eps="epsilon"),
    "tf-slim": _library(*_MOVING, eps=1e-3, momentum=0.999, calls_momentum="decay", calls_eps="epsilon"),
    "mxnet": _library(
        "gamma", "beta", "moving_mean running_mean", "moving_var running_var", eps=1e-3, momentum=0.9
    ),
    "caffe": _library(
        "weight",
        "bias",
        "mean",
        "variance",
        eps=1e-5,
        momentum=0.999,
        calls_momentum="moving_average_fraction",
    ),
    "inplace_abn": _library(*_TORCH, eps=1e-5, momentum=0.1, keeps=False),
    "frozen": _library(*_TORCH, eps=1e-5, momentum=None),
    "timm": _library(*_TORCH, eps=1e-5, momentum=0.1, keeps=False),
    "torch": _library(*_TORCH, eps=1e-5, momentum=0.1, keeps=False),
}


def read(library: str, values: Mapping[str, Any], *, rank: int | None = None, **settings: Any) -> _BatchNorm:
    """A layer of ours that computes what a layer of another library does.

    Args:
        library: "keras", "flax", "tf-slim", "mxnet", "caffe", "inplace_abn", "frozen" (torchvision's and detectron2's
            FrozenBatchNorm2d), "timm" or "torch".
        values: its arrays by name, of numpy, jax or torch, each (C,). Of flax {"params": …, "batch_stats": …} or both
            together; of Caffe {"BatchNorm": [mean, variance, factor], "Scale": [weight, bias]}, the blobs. A weight or
            bias that is missing is 1 or 0, as there.
        rank: 1, 2 or 3 for a BatchNorm1d, 2d or 3d; None for a BatchNorm of any rank.
        settings: of the layer, where they are not the defaults: its momentum and epsilon by their names there
            (`momentum`, TF-slim's `decay`, Caffe's `moving_average_fraction`; `eps` or `epsilon`), MXNet's `fix_gamma`
            (True), inplace_abn's `activation` ("leaky_relu") and `activation_param` (0.01).

    Returns: the layer, float32 or what the values are, in evaluation mode. Its channels are in dimension 1: an input of
        Keras or flax, which have them last, must be permuted.

    Raises:
        ValueError: an unknown library, name or setting; statistics that are missing; shapes that differ.

    Example:
        >>> import torch
        >>> from batchnorm import bridges
        >>> statistics = {"moving_mean": torch.ones(4), "moving_variance": torch.full((4,), 4.0)}
        >>> layer = bridges.read("keras", {"gamma": torch.ones(4), "beta": torch.zeros(4), **statistics}, epsilon=0.0)
        >>> layer(torch.full((1, 4), 5.0)).tolist()
        [[2.0, 2.0, 2.0, 2.0]]
        >>> round(layer.momentum, 6)
        0.01
    """
    known = _of(library)
    fix_gamma = bool(settings.pop("fix_gamma", True)) if library == "mxnet" else False
    activation = _activation(settings) if library == "inplace_abn" else None
    eps = float(settings.pop(known.calls_eps, known.eps))
    momentum = settings.pop(known.calls_momentum, known.momentum) if known.momentum is not None else None
    if settings:
        raise ValueError(f"{library} has no setting {', '.join(map(repr, settings))} that is read here")
    if rank not in _RANKS:
        raise ValueError(f"rank must be 1, 2, 3 or None, got {rank!r}")
    found = _named(library, known, values)
    mean = found["mean"]
    layer = _RANKS[rank](mean.numel(), eps=eps, dtype=mean.dtype)
    if momentum is not None:
        layer.momentum = 1 - momentum if known.keeps else momentum
    if library == "inplace_abn":
        found["weight"] = found.get("weight", torch.ones_like(mean)).abs() + eps
        layer.activation = activation
    if library == "frozen" and "variance" not in values and "running_var" not in values:
        found["variance"] = torch.ones_like(mean) - eps  # so that y = weight·x + bias
    if fix_gamma:
        found["weight"] = torch.ones_like(mean)
    with torch.no_grad():
        for tensor, part in zip(_tensors(layer), ("weight", "bias", "mean", "variance"), strict=True):
            if part in found:
                tensor.copy_(found[part])
    layer.weight.requires_grad_(not fix_gamma and library != "frozen")
    layer.bias.requires_grad_(library != "frozen")
    if library == "frozen":
        layer.statistics = Population()
    return layer.eval()


def write(library: str, layer: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values and settings of a layer of another library that computes what `layer` does.

    Args:
        library: as for `read`.
        layer: of torch's or ours, with running statistics.

    Returns: the values, as `read` takes them, tensors (for Keras and TF-slim in the order of `get_weights`); and the
        settings with which a layer is to be made there.

    Raises:
        ValueError: a layer without running statistics, or whose function the library cannot express: an activation that
            it does not have, a negative or zero weight for inplace_abn.

    Example:
        >>> import torch
        >>> from batchnorm import bridges
        >>> values, settings = bridges.write("flax", torch.nn.BatchNorm2d(4))
        >>> sorted(values), sorted(values["params"]), settings
        (['batch_stats', 'params'], ['bias', 'scale'], {'momentum': 0.9, 'epsilon': 1e-05})
    """
    known = _of(library)
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
        raise ValueError(f"write takes a batch normalization layer, not {type(layer).__name__}")
    if layer.running_mean is None or layer.running_var is None or layer.running_mean.dim() != 1:
        raise ValueError("the layer has no running statistics of channels, which the other library needs")
    activation = getattr(layer, "activation", None)
    if activation is not None and library != "inplace_abn":
        raise ValueError(
            f"{library}'s layer has no activation: set layer.activation = None and apply it behind"
        )
    mean = layer.running_mean.detach().clone()
    found = {
        "weight": torch.ones_like(mean) if layer.weight is None else layer.weight.detach().clone(),
        "bias": torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().clone(),
        "mean": mean,
        "variance": layer.running_var.detach().clone(),
    }
    settings: dict[str, Any] = {}
    if known.momentum is not None:
        momentum = layer.momentum
        if momentum is None:
            raise ValueError(
                f"momentum=None is an average of all batches, which {library} does not have: set a number"
            )
        settings[known.calls_momentum] = round(1 - momentum, 12) if known.keeps else momentum
    settings[known.calls_eps] = layer.eps
    if library == "inplace_abn":
        small = (found["weight"] <= layer.eps).nonzero().flatten().tolist()
        if small:
            raise ValueError(
                f"inplace_abn's weight is |weight| + eps, and that of channels {small[:5]} is not above eps"
            )
        found["weight"] -= layer.eps
        settings |= _activation_settings(activation)
    if library == "mxnet":
        settings["fix_gamma"] = bool((found["weight"] == 1).all()) and not getattr(
            layer.weight, "requires_grad", False
        )
    if library == "tf-slim":
        settings["scale"] = True
    return _arranged(library, known, found), settings


def _of(library: str) -> Library:
    if library not in LIBRARIES:
        raise ValueError(f"no library {library!r} is known here: {', '.join(LIBRARIES)}")
    return LIBRARIES[library]


def _tensors(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.weight, layer.bias, layer.running_mean, layer.running_var


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    found = torch.tensor(value.tolist() if hasattr(value, "tolist") else value, dtype=torch.float64)
    return found if str(getattr(value, "dtype", "")) == "float64" else found.float()


def _named(library: str, known: Library, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The values by our names."""
    if library == "caffe":
        return _of_blobs(values)
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= dict(value) if isinstance(value, Mapping) else {name: value}
    found: dict[str, Tensor] = {}
    for name, value in flat.items():
        if name == "num_batches_tracked":
            continue
        part = next((part for part, names in known.names.items() if name in names), None)
        if part is None:
            own = ", ".join(names[0] for names in known.names.values())
            raise ValueError(f"{library}'s layer has no {name!r}: its values are {own}")
        found[part] = _tensor(value)
    if library == "frozen" and "weight" in found:  # Caffe2's files have these two alone
        found.setdefault("mean", torch.zeros_like(found["weight"]))
        found.setdefault("variance", torch.ones_like(found["weight"]))
    return _checked(library, known, found)


def _checked(library: str, known: Library, found: dict[str, Tensor]) -> dict[str, Tensor]:
    for part in _STATISTICS:
        if part not in found:
            raise ValueError(f"{known.names[part][0]} is missing, which {library}'s layer has")
    shape = found["mean"].shape
    for part, value in found.items():
        if value.dim() != 1 or value.shape != shape:
            raise ValueError(
                f"{known.names[part][0]} has shape {tuple(value.shape)}: each value must be ({shape.numel()},), as "
                f"{known.names['mean'][0]}"
            )
    return found


def _of_blobs(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Caffe's: sums of what the factor is a sum of, of which the averages are the quotients."""
    unknown = values.keys() - {"BatchNorm", "Scale"}
    if unknown or "BatchNorm" not in values or len(values["BatchNorm"]) != 3:
        raise ValueError(
            'of Caffe give {"BatchNorm": [mean, variance, factor], "Scale": [weight, bias]}, the blobs'
        )
    mean, variance, factor = (_tensor(each).flatten() for each in values["BatchNorm"])
    share = 0.0 if float(factor) == 0 else 1 / float(factor)
    found = {"mean": mean * share, "variance": variance * share}
    for part, blob in zip(("weight", "bias"), values.get("Scale", ()), strict=False):
        found[part] = _tensor(blob).flatten()
    return _checked("caffe", LIBRARIES["caffe"], found)


def _arranged(library: str, known: Library, found: dict[str, Tensor]) -> dict[str, Any]:
    """The values by their names there."""
    named = {names[0]: found[part] for part, names in known.names.items()}
    if library == "flax":
        return {
            "params": {name: named[name] for name in ("scale", "bias")},
            "batch_stats": {name: named[name] for name in ("mean", "var")},
        }
    if library == "caffe":
        return {
            "BatchNorm": [found["mean"], found["variance"], torch.ones(1)],
            "Scale": [found["weight"], found["bias"]],
        }
    return named


def _activation(settings: dict[str, Any]) -> Any:
    name, slope = settings.pop("activation", "leaky_relu"), settings.pop("activation_param", 0.01)
    match name:
        case "leaky_relu":
            return "leaky_relu" if slope == 0.01 else nn.LeakyReLU(slope)
        case "elu":
            return nn.ELU(slope)
        case "identity" | "none" | None:
            return None
    raise ValueError(f"inplace_abn has no activation {name!r}: leaky_relu, elu or identity")


def _activation_settings(activation: Any) -> dict[str, Any]:
    match activation:
        case None:
            return {"activation": "identity"}
        case "leaky_relu":
            return {"activation": "leaky_relu", "activation_param": 0.01}
        case "relu":
            return {"activation": "leaky_relu", "activation_param": 0.0}
        case nn.LeakyReLU(negative_slope=slope):
            return {"activation": "leaky_relu", "activation_param": slope}
        case nn.ELU(alpha=alpha):
            return {"activation": "elu", "activation_param": alpha}
    raise ValueError(f"inplace_abn has no activation {activation!r}: leaky_relu, elu or identity")
