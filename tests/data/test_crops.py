"""Where the crops for evaluation lie, and what their pixels are."""

import pickle

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision", reason="torchvision is an extra")
from torchvision.transforms.v2 import functional as F

from batchnorm.data.crops import multi_crop, single_crop

SHAPES = [(1, 28, 28), (3, 45, 60), (3, 61, 44), (1, 9, 50)]
A_LEVEL = 2 / 255  # of 256; resizing rounds each pixel to one


def gradient(height: int, width: int) -> Tensor:
    """An image whose red says the row and whose green the column of a pixel."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)]).byte()


def noise(channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


def places(crops: Tensor) -> list[tuple[int, int]]:
    """The row and column of the image from which the first pixel of each crop comes, for unresized gradients."""
    levels = ((crops + 1) * 127.5).round().int()
    return [(int(crop[0, 0, 0]), int(crop[1, 0, 0])) for crop in levels]


def reference(image: Tensor, size: int) -> Tensor:
    """multi_crop, spelled out."""
    crops = []
    for scale in (256, 288, 320, 352):
        side = round(scale / 224 * size)
        resized = F.resize(image, [side], antialias=True)
        height, width = resized.shape[1:]
        for where in ("first", "central", "last"):
            top = {"first": 0, "central": (height - side) // 2, "last": height - side}[where]
            left = {"first": 0, "central": (width - side) // 2, "last": width - side}[where]
            square = F.crop(resized, top, left, side, side)
            middle = (side - size) // 2
            crops += [
                F.crop(square, 0, 0, size, size),
                F.crop(square, 0, side - size, size, size),
                F.crop(square, side - size, 0, size, size),
                F.crop(square, side - size, side - size, size, size),
                F.crop(square, middle, middle, size, size),
                F.resize(square, [size, size], antialias=True),
            ]
    crops += [F.horizontal_flip(crop) for crop in crops]
    return torch.stack([(F.to_dtype(crop, torch.float32, scale=True) - 0.5) * 2 for crop in crops])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [8, 28])
def test_the_144_crops_are_what_the_description_spells_out(shape, size):
    crops = multi_crop(size)(noise(*shape))
    assert crops.shape == (144, shape[0], size, size)
    assert crops.dtype == torch.float32
    torch.testing.assert_close(crops, reference(noise(*shape), size), rtol=0, atol=1e-6)


def test_the_crops_lie_where_googlenet_has_them():
    # 32 is the first scale of 28: nothing is resized but the sixth crop of each square
    crops = multi_crop(28)(gradient(32, 51))[:18]
    assert places(crops) == [
        *[(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (0, 0)],
        *[(0, 9), (0, 13), (4, 9), (4, 13), (2, 11), (0, 9)],
        *[(0, 19), (0, 23), (4, 19), (4, 23), (2, 21), (0, 19)],
    ]


def test_larger_scales_show_less_of_the_image_in_the_same_place():
    corners = multi_crop(28)(gradient(200, 200)).unflatten(0, (2, 4, 3, 6))[0, :, 1, 3]
    shown = (
        corners[:, :, -1, -1] - corners[:, :, 0, 0]
    ) * 127.5  # rows and columns between first and last pixel
    expected = torch.tensor([27 * 200 / side for side in (32, 36, 40, 44)])
    torch.testing.assert_close(shown[:, 0], expected, rtol=0, atol=2)
    torch.testing.assert_close(shown[:, 1], expected, rtol=0, atol=2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_second_half_mirrors_the_first(shape):
    crops = multi_crop(8)(noise(*shape))
    assert torch.equal(crops[72:], crops[:72].flip(-1))
    assert not torch.equal(crops[72:], crops[:72])


def test_the_three_squares_of_a_square_image_coincide():
    squares = multi_crop(8)(noise(3, 40, 40)).unflatten(0, (2, 4, 3, 6)).unbind(2)
    assert torch.equal(squares[0], squares[1])
    assert torch.equal(squares[0], squares[2])


def test_portrait_images_are_cut_as_landscapes_lying_on_their_side():
    image = noise(3, 45, 61)
    upright, lying = (multi_crop(8)(picture)[:72].unflatten(0, (12, 6)) for picture in (image.mT, image))
    other_corners = lying[:, [0, 2, 1, 3, 4, 5]].mT  # top right and bottom left change places
    torch.testing.assert_close(upright, other_corners, rtol=0, atol=2 * A_LEVEL)


@pytest.mark.parametrize(
    ("height", "width", "place"),
    [
        (28, 28, (0, 0)),  # not magnified
        (28, 41, (0, 6)),
        (41, 28, (6, 0)),
        (32, 51, (2, 11)),
        (51, 33, None),  # resized
    ],
)
def test_a_single_crop_is_the_centre(height, width, place):
    crop = single_crop(28)(gradient(height, width))
    assert crop.shape == (3, 28, 28)
    assert crop.dtype == torch.float32
    if place:
        top, left = place
        expected = gradient(height, width)[:, top : top + 28, left : left + 28]
        assert torch.equal(((crop + 1) * 127.5).round().byte(), expected)
    else:
        middle = ((crop[:2] + 1) * 127.5).mean((1, 2))
        torch.testing.assert_close(middle, torch.tensor([25.0, 16.0]), rtol=0, atol=1)


@pytest.mark.parametrize("shape", [(3, 45, 60), (3, 61, 44), (1, 256, 224), (1, 20, 30)])
def test_a_single_crop_is_resized_before_it_is_cut(shape):
    image = noise(*shape)
    shorter = 28 if min(shape[1:]) <= 28 else 32
    resized = F.resize(image, [shorter], antialias=True)
    top, left = (resized.shape[1] - 28) // 2, (resized.shape[2] - 28) // 2
    expected = (F.crop(resized, top, left, 28, 28) / 255 - 0.5) * 2
    torch.testing.assert_close(single_crop(28)(image), expected, rtol=0, atol=1e-6)


def test_black_is_minus_one_and_white_is_one():
    image = torch.tensor([[[0, 255], [51, 204]]], dtype=torch.uint8)
    torch.testing.assert_close(single_crop(2)(image), torch.tensor([[[-1.0, 1.0], [-0.6, 0.6]]]))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 40), (1, 40, 1)])
def test_the_thinnest_images_have_crops(shape):
    image = noise(*shape)
    for crops in (single_crop(8)(image), multi_crop(8)(image), multi_crop(1)(image)):
        assert crops.isfinite().all()


def test_the_image_stays_as_it_is():
    image = noise(3, 28, 28)
    before = image.clone()
    single_crop(28)(image)
    multi_crop(28)(image)
    assert torch.equal(image, before)


@pytest.mark.parametrize("crop", [single_crop, multi_crop])
def test_crops_travel_to_other_processes(crop):
    image = noise(3, 20, 30)
    assert torch.equal(pickle.loads(pickle.dumps(crop(8)))(image), crop(8)(image))


@pytest.mark.parametrize("crop", [single_crop, multi_crop])
@pytest.mark.parametrize("size", [0, -28])
def test_a_size_below_one_is_an_error(crop, size):
    with pytest.raises(ValueError, match=f"size is {size}, expected at least 1"):
        crop(size)


@pytest.mark.parametrize("crop", [single_crop, multi_crop])
@pytest.mark.parametrize(
    ("image", "says"),
    [
        (torch.zeros(3, 9, 9), r"not float32 \(3, 9, 9\)"),
        (torch.zeros(9, 9, dtype=torch.uint8), r"not uint8 \(9, 9\)"),
        (torch.zeros(3, 9, dtype=torch.uint8), r"not uint8 \(3, 9\)"),
        (torch.zeros(3, 2, 9, 9, dtype=torch.uint8), r"not uint8 \(3, 2, 9, 9\)"),
        (torch.zeros(4, 9, 9, dtype=torch.uint8), r"not uint8 \(4, 9, 9\)"),
        (torch.zeros(3, 9, 0, dtype=torch.uint8), r"not uint8 \(3, 9, 0\)"),
    ],
)
def test_what_is_no_image_is_an_error(crop, image, says):
    with pytest.raises(ValueError, match=says):
        crop(8)(image)
