"""The crops of an image for evaluation: a single central crop, or the 144 of GoogLeNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

# the shorter side to which an image is resized, for crops of _CROP pixels
_SINGLE = 256  # as in most papers
_MULTI = (256, 288, 320, 352)  # Szegedy et al. 2014, section 7
_CROP = 224


def single_crop(size: int) -> Callable[[Tensor], Tensor]:
    """The central crop: uint8 (C, H, W) -> float32 (C, size, size) in [-1, 1].

    The shorter side is resized to 256/224 of `size`, rounded, and the central square of `size` pixels is cut out. An
    image whose shorter side is not larger than `size` is resized to a shorter side of `size` instead. If a margin is
    odd, the crop is half a pixel towards the top or the left. Resizing is bilinear, with antialias.

    Raises: ValueError for a size below 1 and, when called, for a tensor that is not an image.
    """
    return partial(_single_crop, expect_size(size))


def multi_crop(size: int) -> Callable[[Tensor], Tensor]:
    """GoogLeNet's crops (Szegedy et al. 2014, section 7): uint8 (C, H, W) -> float32 (144, C, size, size) in [-1, 1].

    The shorter side is resized to 256/224, 288/224, 320/224 and 352/224 of `size`, rounded; of each scale the left,
    central and right square are taken, in portrait images the top, central and bottom one; of each square the four
    corners (top left, top right, bottom left, bottom right), the centre, and the square itself resized to `size`.
    In this order, the scale varying slowest, these are 72 crops; their mirror images follow. If a margin is odd, the
    central crop is half a pixel towards the top or the left. Resizing is bilinear with antialias.

    Raises: ValueError for a size below 1 and, when called, for a tensor that is not an image.
    """
    return partial(_multi_crop, expect_size(size))


def expect_image(image: Tensor) -> None:
    """Raise ValueError unless `image` is uint8 (C, H, W) with one or three channels and at least one pixel."""
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in (1, 3) or image.numel() == 0:
        raise ValueError(
            f"an image is uint8 (1 or 3, height, width), not {image.dtype} {tuple(image.shape)}".replace(
                "torch.", ""
            )
        )


def expect_size(size: int) -> int:
    """`size`, a number of pixels; raises ValueError when it is below 1."""
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1 pixel")
    return size


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [0, 1], a copy."""
    return pixels.float().div_(255)


def to_signed_range(pixels: Tensor) -> Tensor:
    """Scale pixels from [0, 1] to [-1, 1], in place; TF-slim's (x - 0.5) · 2."""
    return pixels.sub_(0.5).mul_(2)


def _single_crop(size: int, image: Tensor) -> Tensor:
    expect_image(image)
    shorter = size if min(image.shape[1:]) <= size else round(size * _SINGLE / _CROP)
    image = F.resize(image, [shorter])
    top, left = ((side - size) // 2 for side in image.shape[1:])
    return to_signed_range(to_unit_range(_cut(image, top, left, size)))


def _multi_crop(size: int, image: Tensor) -> Tensor:
    expect_image(image)
    crops = torch.stack([view for square in _squares(image, size) for view in _views(square, size)])
    return to_signed_range(to_unit_range(torch.cat([crops, crops.flip(-1)])))


def _squares(image: Tensor, size: int) -> Iterator[Tensor]:
    for scale in _MULTI:
        side = round(size * scale / _CROP)
        resized = F.resize(image, [side])
        margin_height, margin_width = (length - side for length in resized.shape[1:])  # one of them is 0
        for halves in range(3):
            yield _cut(resized, margin_height * halves // 2, margin_width * halves // 2, side)


def _views(square: Tensor, size: int) -> Iterator[Tensor]:
    far = square.shape[-1] - size
    for top, left in ((0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2)):
        yield _cut(square, top, left, size)
    yield F.resize(square, [size, size])


def _cut(image: Tensor, top: int, left: int, side: int) -> Tensor:
    return image[:, top : top + side, left : left + side]
