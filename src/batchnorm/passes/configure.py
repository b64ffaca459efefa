"""Options of many layers at once."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from types import EllipsisType
from typing import Any, Literal, TypeVar

from torch import nn

from batchnorm.graph.modules import is_ours, layers_of
from batchnorm.layers import check_options
from batchnorm.passes.report import LayerReport, Report
from batchnorm.passes.rollback import unchanged_on_failure
from batchnorm.passes.swap import convert_layers
from batchnorm.statistics.batch import Statistics
from batchnorm.statistics.population import Population

M = TypeVar("M", bound=nn.Module)


def configure(
    model: M,
    *,
    momentum: float | EllipsisType | None = ...,
    eps: float | EllipsisType = ...,
    statistics: Statistics | EllipsisType | None = ...,
    debiased: bool | EllipsisType = ...,
    on_single: Literal["raise", "running"] | EllipsisType = ...,
    only: str | Iterable[str] = "*",
) -> tuple[M, Report]:
    """Set options of the batch normalization of `model`, in place; what is not given stays as it is.

    torch's layers have `momentum` and `eps` and stay torch's for these; for the others they become ours.

    Args:
        model: with layers of torch's or ours.
        momentum: weight of the new batch in the running statistics, or None for their average, as of `BatchNorm2d`.
        eps: added to the variance, inside the root, at least 0.
        statistics: by whose moments training batches are normalised: Ghost(32), say, for a whole model. A frozen layer
            stays frozen and has them when it is unfrozen.
        debiased: whether the exponential average forgets what the buffers began with.
        on_single: what one value per channel does in training.
        only: the layers that are meant, by path: a pattern as of file names, "backbone.*" (a dot is nothing special),
            or several.

    Returns: `model` itself, and a Report that lists the layers, "configured" with what was set.

    Raises:
        ValueError: nothing is given; a value that no layer takes; a pattern that no layer matches; names each layer
            that would have to become ours and cannot. Then nothing has been changed.
        TypeError: `statistics` is none of this library's.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> model, report = bn.configure(model, momentum=0.01, statistics=bn.Ghost(32))
        >>> report
        1  configured  momentum=0.01, statistics=Ghost(size=32)
        1 layer: 1 configured
    """
    given: dict[str, Any] = {
        name: value
        for name, value in (
            ("momentum", momentum),
            ("eps", eps),
            ("statistics", statistics),
            ("debiased", debiased),
            ("on_single", on_single),
        )
        if value is not ...
    }
    _check(given)
    layers = layers_of(model)
    patterns = [only] if isinstance(only, str) else list(only)
    unmatched = [each for each in patterns if not any(fnmatchcase(name, each) for name in layers)]
    if unmatched:
        raise ValueError(
            f"no batch normalization has a path like {', '.join(map(repr, unmatched))}: "
            f"there are {', '.join(layers) or 'none'}"
        )
    chosen = {name: each for name, each in layers.items() if any(fnmatchcase(name, one) for one in patterns)}
    with unchanged_on_failure(model):
        if given.keys() - {"momentum", "eps"}:
            convert_layers(chosen)
        for layer in chosen.values():
            for name, value in given.items():
                if name == "statistics" and is_ours(layer) and isinstance(layer.statistics, Population):
                    value = Population(value)
                setattr(layer, name, value)
    what = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return model, Report(
        tuple(
            LayerReport(name, "configured", what)
            if name in chosen
            else LayerReport(name, "left alone", why="only others were meant")
            for name in layers
        )
    )


def _check(given: dict[str, Any]) -> None:
    if not given:
        raise ValueError("nothing to configure: give momentum, eps, statistics, debiased or on_single")
    momentum, eps = given.get("momentum"), given.get("eps", 0)
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum is the weight of the new batch, from 0 to 1, or None, got {momentum!r}")
    if not eps >= 0:
        raise ValueError(f"eps is added to a variance and at least 0, got {eps!r}")
    check_options(given.get("statistics"), given.get("on_single", "raise"))
