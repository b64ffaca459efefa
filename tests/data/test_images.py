"""Image files become uint8 RGB, or are unreadable and say so."""

import io
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="images come with the extra")

from PIL import Image

from batchnorm.data.images import decode
from batchnorm.data.source import Unreadable
from tests.data.pictures import encoded, picture

JPEG, PNG = encoded(picture(0)), encoded(picture(0), "PNG")
ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6  # turn it by 90 degrees to look at it


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def test_a_png_comes_back_pixel_for_pixel():
    image = decode(PNG, "a")
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(picture(0)))


def test_a_path_reads_as_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(JPEG)
    assert torch.equal(decode(tmp_path / "a", "a"), decode(JPEG, "a"))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_any_colours_become_rgb(mode):
    format = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    image = decode(encoded(picture(0, mode), format), "a")
    assert image.shape == (3, 12, 10)
    np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(picture(0, mode).convert("RGB")))


def test_a_cmyk_jpeg_is_not_inverted():
    red = Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK")
    assert decode(encoded(red), "a")[:, 8, 8].tolist() == pytest.approx([250, 10, 10], abs=12)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight_by_scale_not_by_clipping(format):
    grey = np.linspace(0, 65535, 120).reshape(12, 10).astype(np.uint16)
    image = decode(encoded(Image.fromarray(grey), format), "a")
    np.testing.assert_array_equal(image[0], grey >> 8)
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize(
    "exif",
    [ORIENTED.tobytes(), b"Exif\0\0garbage", ORIENTED.tobytes()[:20]],
    ids=["turned", "garbage", "torn"],
)
def test_metadata_changes_no_pixel(exif):
    assert torch.equal(decode(encoded(picture(0), exif=exif), "a"), decode(JPEG, "a"))


def test_transparency_in_a_palette_and_many_pixels_only_warn(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(PNG)).close()
    assert decode(PNG, "a").shape == (3, 12, 10)
    transparent = encoded(picture(0, "P"), "PNG", transparency=bytes(range(256)))
    assert decode(transparent, "a").shape == (3, 12, 10)


def test_a_decompression_bomb_is_unreadable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(Unreadable, match="exceeds limit"):
        decode(PNG, "a")


@pytest.mark.parametrize(
    "content",
    [b"", b"No image here\n", JPEG[: len(JPEG) // 2], JPEG[:20], PNG[: len(PNG) // 2], PNG[:30]],
    ids=["empty", "text", "half a jpeg", "a jpeg's head", "half a png", "a png's head"],
)
def test_what_is_no_whole_image_is_unreadable_under_its_name(content):
    with pytest.raises(Unreadable, match=r"^shelf/7\.jpg: \S.*$"):
        decode(content, "shelf/7.jpg")


def test_a_flipped_byte_anywhere_in_a_png_is_unreadable_or_does_no_harm():
    bad = 0
    for at in range(len(PNG)):
        try:
            assert decode(flipped(PNG, at), "a").shape[0] == 3
        except Unreadable:
            bad += 1
    assert bad > 0.9 * len(PNG)


def test_unreadable_survives_a_pickle():
    error = pickle.loads(pickle.dumps(Unreadable("a.jpg", "torn")))
    assert str(error) == "a.jpg: torn"
    assert (error.name, error.why) == ("a.jpg", "torn")
