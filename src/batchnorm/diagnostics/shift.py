"""How the input of a layer shifts in a training: what a look at it gives, and what has come of those before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.diagnostics.distribution import Distribution

Percentiles = tuple[float, float, float]


@dataclass(frozen=True)
class Shift:
    """The input of a layer in one training step, and how it has moved.

    Drifts are root mean squares over channels. Each batch is another one, so even those of a network that stands still
    are not 0: the noise says what they would be.

    step: steps of training before it.
    layer: its path.
    unit: the channel whose percentiles are here.
    percentiles: the 15th, 50th and 85th of the unit.
    layer_percentiles: those of all channels together.
    steps: since the last look; 0 at the first one, which has no drifts.
    mean_drift: |μ - μ before| / σ before.
    std_drift: |log(σ / σ before)|.
    mean_noise, std_noise: what both would be by the choice of examples alone, if these were independent.
    moved: from the first look to here, the distance of medians in units of the mean 15-85 width, mean over channels.
    travel: the same along the path from look to look.
    """

    step: int
    layer: str
    unit: int
    percentiles: Percentiles
    layer_percentiles: Percentiles
    steps: int = 0
    mean_drift: float | None = None
    std_drift: float | None = None
    mean_noise: float | None = None
    std_noise: float | None = None
    moved: float | None = None
    travel: float | None = None


class Track:
    """The looks at a layer until now, as far as the next one needs them.

    layer: its path.
    unit: the channel to show; None: a typical one, which the first look chooses.
    """

    def __init__(self, layer: str, unit: int | None) -> None:
        self._layer, self._wanted = layer, unit
        self._step = 0
        self._unit = 0
        self.last: Distribution | None = None
        self._first = self._path = self._widths = torch.empty(0)
        self._looks = 0

    def add(self, step: int, found: Distribution) -> Shift:
        """What a look shows; one at inf or nan is not kept for the next."""
        # not the same number of channels: another layer has come to this place, and a new beginning
        before = self.last if self.last is not None and self.last.mean.shape == found.mean.shape else None
        if before is None:
            self._unit = typical(found) if self._wanted is None else self._wanted
        shown = self._unit, _three(found.percentiles[:, self._unit]), _three(found.of_all)
        if not found.is_finite:
            return Shift(step, self._layer, *shown, 0 if before is None else step - self._step)
        if before is None:
            self._begin(found)
            drifts: dict[str, Any] = {}
        else:
            self._path += (found.percentiles[1] - before.percentiles[1]).abs()
            self._widths += found.width
            self._looks += 1
            drifts = _drifts(before, found) | {"steps": step - self._step}
        drifts["moved"] = self._in_widths((found.percentiles[1] - self._first).abs())
        drifts["travel"] = self._in_widths(self._path)
        self.last, self._step = found, step
        return Shift(step, self._layer, *shown, **drifts)

    def _begin(self, found: Distribution) -> None:
        self._first = found.percentiles[1]
        self._path = torch.zeros_like(self._first)
        self._widths = found.width.clone()
        self._looks = 1

    def _in_widths(self, distance: Tensor) -> float | None:
        wide = self._widths > 0
        return float((distance / self._widths * self._looks)[wide].mean()) if bool(wide.any()) else None


def typical(found: Distribution) -> int:
    """The channel whose mean and spread are nearest to their medians over channels."""
    if not bool(found.varies.any()):
        return 0
    middle, spread = found.mean[found.varies].median(), found.std[found.varies].median()
    distance = ((found.mean - middle) / spread).square() + (found.std / spread).log().square()
    return int(torch.where(found.varies, distance, torch.inf).argmin())


def _drifts(before: Distribution, found: Distribution) -> dict[str, float | None]:
    alive = before.varies & found.varies
    if not bool(alive.any()):
        return {}
    of_mean = (found.mean - before.mean).square() / before.variance
    of_std = (found.variance / before.variance).log().square() / 4
    mean_noise = (found.mean_error + before.mean_error) / before.variance
    # log σ = ½ log σ²
    shares = (each.variance_error / each.variance.square() / 4 for each in (before, found))
    found_by = {
        "mean_drift": of_mean,
        "std_drift": of_std,
        "mean_noise": mean_noise,
        "std_noise": torch.stack([*shares]).sum(0),
    }
    means = {name: float(each[alive].mean().sqrt()) for name, each in found_by.items()}
    return {name: value if value == value else None for name, value in means.items()}  # nan: a single example


def _three(values: Tensor) -> Percentiles:
    low, median, high = values.tolist()
    return low, median, high
