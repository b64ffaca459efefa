"""Image files to test with: small, random, each told from the others by its content."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def image_folder(root: Path, train: int = 6, val: int = 3, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """ImageNet's layout: `train` and `val` images in each class."""
    for at, name in enumerate(classes):
        for split, count in (("train", train), ("val", val)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = picture(1000 * at + 100 * (split == "val") + number)
                (folder / f"{number:02}.jpg").write_bytes(encoded(image))
    return root
