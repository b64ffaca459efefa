"""Data augmentation of training images: random crop, mirroring and photometric distortion."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from batchnorm.data.crops import expect_image, expect_size, to_signed_range, to_unit_range

Distortion = Literal["full", "reduced", "none"]

_NARROWEST, _WIDEST = 3 / 4, 4 / 3  # width by height of a crop
_ATTEMPTS = 10  # torchvision's


class Box(NamedTuple):
    """A rectangle within an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class _Step(NamedTuple):
    """A photometric distortion of float32 (C, H, W) in [0, 1], by a random amount from `low` to `high`."""

    change: Callable[[Tensor, float], Tensor]
    low: float
    high: float


def _brighten(image: Tensor, by: float) -> Tensor:
    return (image + by).clamp_(0, 1)


# Saturation and hue do not change grey images.
_BRIGHTNESS = _Step(_brighten, -32 / 255, 32 / 255)
_SATURATION = _Step(F.adjust_saturation, 0.5, 1.5)
_HUE = _Step(F.adjust_hue, -0.2, 0.2)
_CONTRAST = _Step(F.adjust_contrast, 0.5, 1.5)
_STEPS: dict[Distortion, tuple[_Step, ...]] = {
    "full": (_BRIGHTNESS, _SATURATION, _HUE, _CONTRAST),
    "reduced": (_BRIGHTNESS, _SATURATION),
    "none": (),
}


def training_transform(
    size: int,
    *,
    crop_area: tuple[float, float] = (0.08, 1.0),
    mirror: bool = True,
    distortion: Distortion = "full",
) -> Callable[[Tensor], Tensor]:
    """A random view of an image: uint8 (C, H, W), C 1 or 3 -> float32 (C, size, size) in [-1, 1].

    A crop of random position, size and aspect ratio is resized (bilinear, antialias), randomly mirrored and distorted.
    The paper says only that it reduces the photometric distortions (section 4.2.1); their ranges are those of TF-slim's
    Inception preprocessing. They are applied in random order, and each clips its result. Saturation blends with the
    grey image and contrast with its mean, as in Howard (2013), whom GoogLeNet cites; TF-slim instead scales the S of
    HSV, and each channel about its own mean.

    The result can be pickled and draws from torch's global random generator.

    Args:
        size: height and width of the result in pixels.
        crop_area: share of the image that a crop covers, drawn uniformly from this range; see `random_box`.
        mirror: swap left and right with probability 1/2.
        distortion: "full": brightness ±32/255, saturation 0.5 to 1.5, hue ±0.2 of a turn, contrast 0.5 to 1.5, as
            TF-slim's slow mode. "reduced": brightness and saturation, as its fast mode. "none". Saturation and hue do
            not change grey images.

    Raises: ValueError for a size below 1, an area not within (0, 1], an unknown distortion and, when called, for a
        tensor that is not an image.
    """
    low, high = crop_area
    if not 0 < low <= high <= 1:
        raise ValueError(f"crop_area is {crop_area}, expected two shares, 0 < low <= high <= 1")
    if distortion not in _STEPS:
        raise ValueError(f"distortion is {distortion!r}, expected one of {', '.join(_STEPS)}")
    return partial(_transform, expect_size(size), crop_area, mirror, distortion)


def random_box(height: int, width: int, area: tuple[float, float]) -> Box:
    """A random crop box for an image of `height` × `width` pixels (Szegedy et al. 2014, section 6).

    The share of the image is uniform in `area`; the aspect ratio, width by height, is log-uniform in 3/4 to 4/3; the
    position is uniform. If ten boxes in a row do not fit, as in a panorama, the result is the largest central box with
    an aspect ratio in that range. torchvision's RandomResizedCrop does the same; here one call draws all random
    numbers, since on small images such calls dominate the time.
    """
    low, high = area
    for share, shape, down, right in torch.rand(_ATTEMPTS, 4, dtype=torch.float32).tolist():
        pixels = height * width * (low + (high - low) * share)
        aspect = _NARROWEST * (_WIDEST / _NARROWEST) ** shape
        rows, columns = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            return Box(int(down * (height - rows + 1)), int(right * (width - columns + 1)), rows, columns)
    rows, columns = min(height, round(width / _NARROWEST)), min(width, round(height * _WIDEST))
    return Box((height - rows) // 2, (width - columns) // 2, rows, columns)


def _transform(
    size: int, area: tuple[float, float], mirror: bool, distortion: Distortion, image: Tensor
) -> Tensor:
    expect_image(image)
    height, width = image.shape[1:]
    image = F.resized_crop(image, *random_box(height, width, area), [size, size])
    if mirror and torch.rand(1, dtype=torch.float32).item() < 0.5:
        image = image.flip(-1)
    return to_signed_range(_distort(to_unit_range(image), _STEPS[distortion]))


def _distort(image: Tensor, steps: tuple[_Step, ...]) -> Tensor:
    shares = torch.rand(len(steps), dtype=torch.float32).tolist()
    for index in torch.randperm(len(steps)).tolist():
        change, low, high = steps[index]
        image = change(image, low + (high - low) * shares[index])
    return image
