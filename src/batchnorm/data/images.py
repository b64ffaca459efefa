"""Image files as tensors, whatever colours and metadata they come with."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from batchnorm.data.source import Unreadable


def decode(file: Path | bytes, name: str) -> Tensor:
    """An image file, by its path or as its bytes, as uint8 (3, H, W) in RGB.

    Grey, palette and CMYK images become RGB, 16-bit ones 8-bit; transparency is dropped. An orientation in
    the metadata is not applied: ImageNet's published accuracies are of images as they are stored.

    Raises: Unreadable, under `name`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, many pixels: what matters raises
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                return torch.from_numpy(_rgb(image)).permute(2, 0, 1).contiguous()
    except Exception as error:  # of torn and forged files, Pillow's decoders raise nearly anything
        raise Unreadable(name, " ".join(str(error).split()) or type(error).__name__) from None


def _rgb(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(H, W, 3)."""
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 8: nearly all of it white
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return np.array(image.convert("RGB"))
