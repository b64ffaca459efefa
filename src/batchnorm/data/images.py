"""Decode image files to tensors, in RGB or grey."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from batchnorm.data.source import Unreadable


def decode(file: Path | bytes, name: str, channels: int = 3) -> Tensor:
    """The image in a file, given by path or bytes, as uint8 (3, H, W) in RGB, or (1, H, W) in grey.

    Grey, palette and CMYK images become RGB, 16-bit images become 8-bit; transparency is dropped; a GIF is its first
    picture. The EXIF orientation is not applied: published ImageNet accuracies are for images as they are stored.

    Raises: Unreadable, with `name`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata and large images; real problems raise
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                rgb = _rgb(image)
                pixels = np.array(rgb.convert("L"))[..., None] if channels == 1 else np.array(rgb)
                return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    except Exception as error:  # on corrupt files, Pillow's decoders raise nearly any exception
        raise Unreadable(name, " ".join(str(error).split()) or type(error).__name__) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's convert would clip 16-bit values at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
