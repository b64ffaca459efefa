"""Random views of training images: which part of the image, which way round, in which light and colours."""

import colorsys
import pickle
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision", reason="torchvision is an extra")
from torchvision.transforms.v2 import functional as F

from batchnorm.data import distortion
from batchnorm.data.crops import single_crop
from batchnorm.data.distortion import Distortion, random_box, training_transform

KINDS: tuple[Distortion, ...] = ("full", "reduced", "none")
SHIFT = 2 * 32 / 255  # the largest change of brightness, in [-1, 1]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def noise(channels: int, height: int, width: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, (channels, height, width), dtype=torch.uint8)


def plain(size: int, kind: Distortion) -> Callable[[Tensor], Tensor]:
    """Photometric distortion alone; of square images."""
    return training_transform(size, crop_area=(1, 1), mirror=False, distortion=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (3, 32, 32), (3, 20, 90), (1, 90, 7), (1, 1, 40), (3, 40, 1), (1, 1, 1)]
)
def test_every_image_becomes_a_square_from_minus_one_to_one(shape, kind):
    transform = training_transform(24, distortion=kind)
    for _ in range(10):
        view = transform(noise(*shape))
        assert view.shape == (shape[0], 24, 24)
        assert view.dtype == torch.float32
        assert view.isfinite().all()
        assert view.abs().max() <= 1


# --- crops


def test_boxes_cover_the_area_that_was_asked_for():
    shares, aspects = [], []
    for _ in range(2000):
        box = random_box(1000, 1000, (0.1, 0.5))
        assert 0 <= box.top <= 1000 - box.height
        assert 0 <= box.left <= 1000 - box.width
        shares.append(box.height * box.width / 1e6)
        aspects.append(box.width / box.height)
    quantiles = torch.tensor(shares).quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), rtol=0, atol=0.02)
    quantiles = torch.tensor(aspects).log().quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    widest = torch.tensor(4 / 3).log()
    torch.testing.assert_close(
        quantiles / widest, torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]), rtol=0, atol=0.06
    )


def test_boxes_lie_everywhere():
    places = Counter[tuple[int, int]]()
    for _ in range(2000):
        box = random_box(8, 8, (0.55, 0.56))  # 6 × 6 in the middle of the shapes
        if (box.height, box.width) == (6, 6):
            places[box.top, box.left] += 1
    assert set(places) == {(top, left) for top in range(3) for left in range(3)}
    assert min(places.values()) > 0.6 * max(places.values())


def test_a_panorama_is_cropped_too():
    boxes = [random_box(100, 1000, (0.5, 1.0)) for _ in range(20)]
    assert set(boxes) == {(0, 433, 100, 133)}
    assert random_box(1000, 100, (0.5, 1.0)) == (433, 0, 133, 100)
    assert random_box(1, 40, (0.08, 1.0)) == (0, 19, 1, 1)


def test_small_shares_of_a_panorama_lie_everywhere():
    boxes = [random_box(100, 300, (0.08, 1.0)) for _ in range(300)]
    assert min(box.left for box in boxes) < 10
    assert max(box.left + box.width for box in boxes) > 290
    assert sum(box == (0, 83, 100, 133) for box in boxes) < 50  # ten in a row seldom fit nowhere


def test_a_view_is_the_box_resized():
    image = noise(3, 60, 80)
    view = training_transform(28, mirror=False, distortion="none")(image)
    torch.manual_seed(0)
    noise(3, 60, 80)
    top, left, height, width = random_box(60, 80, (0.08, 1.0))
    expected = F.resize(image[:, top : top + height, left : left + width], [28, 28], antialias=True)
    torch.testing.assert_close(view, expected / 127.5 - 1, rtol=0, atol=1e-6)


def test_the_default_area_is_googlenets():
    image = noise(1, 60, 60)
    torch.manual_seed(1)
    default = training_transform(8)(image)
    torch.manual_seed(1)
    assert torch.equal(
        default, training_transform(8, crop_area=(0.08, 1.0), mirror=True, distortion="full")(image)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_an_undistorted_whole_image_is_what_evaluation_sees(channels):
    image = noise(channels, 28, 28)
    assert torch.equal(plain(28, "none")(image), single_crop(28)(image))


def test_every_other_image_is_mirrored():
    image = noise(1, 8, 8)
    expected = single_crop(8)(image)
    transform = training_transform(8, crop_area=(1, 1), distortion="none")
    views = [transform(image) for _ in range(400)]
    assert all(torch.equal(view, expected) or torch.equal(view, expected.flip(-1)) for view in views)
    assert 160 < sum(torch.equal(view, expected.flip(-1)) for view in views) < 240


# --- light and colours


def test_reduced_distortion_of_grey_images_is_brightness_alone():
    image = noise(1, 8, 8, 60, 190)
    shifts = [plain(8, "reduced")(image) - single_crop(8)(image) for _ in range(200)]
    assert all(shift.max() - shift.min() < 1e-5 for shift in shifts)
    means = torch.stack([shift.mean() for shift in shifts])
    assert 0.9 * SHIFT < means.max() <= SHIFT + 1e-5
    assert -0.9 * SHIFT > means.min() >= -SHIFT - 1e-5
    assert means.mean().abs() < 0.2 * SHIFT


def test_full_distortion_of_grey_images_is_brightness_and_contrast():
    image = noise(1, 8, 8, 100, 156)
    before = single_crop(8)(image)
    contrasts, means = [], []
    for _ in range(200):
        view = plain(8, "full")(image)
        contrast = view.std() / before.std()
        torch.testing.assert_close(view - view.mean(), (before - before.mean()) * contrast, rtol=0, atol=1e-5)
        contrasts.append(contrast.item())
        means.append((view.mean() - before.mean()).item())
    assert 0.5 <= min(contrasts) < 0.55
    assert 1.45 < max(contrasts) <= 1.5 + 1e-4
    assert -SHIFT - 1e-5 <= min(means) < -0.9 * SHIFT
    assert 0.9 * SHIFT < max(means) <= SHIFT + 1e-5


def colours(kind: Distortion) -> Tensor:
    """(200, 3): what distortion does to the hue, in turns, and, as factors, to the chroma and to the range of pixels.

    The image has two muted colours of one hue, one lighter than the other, so that nothing is ever clipped.
    """
    dark, light = torch.tensor([130, 115, 110]), torch.tensor([150, 135, 130])
    image = torch.stack([dark, light], -1).byte()[:, None].repeat(1, 2, 1)
    hue = colorsys.rgb_to_hsv(130, 115, 110)[0]
    rows = []
    for _ in range(200):
        dark, light = plain(2, kind)(image)[:, 0].mul(127.5).unbind(-1)
        turn = (colorsys.rgb_to_hsv(*(dark + 127.5).tolist())[0] - hue + 0.5) % 1 - 0.5
        rows.append([turn, (dark.max() - dark.min()).item() / 20, (light - dark).mean().item() / 20])
    return torch.tensor(rows)


def test_reduced_distortion_of_colours_is_brightness_and_saturation():
    turns, chroma, contrast = colours("reduced").unbind(-1)
    assert turns.abs().max() < 1e-3
    assert 0.5 - 1e-3 <= chroma.min() < 0.55
    assert 1.45 < chroma.max() <= 1.5 + 1e-3
    torch.testing.assert_close(contrast, torch.ones(200), rtol=0, atol=1e-3)


def test_full_distortion_of_colours_turns_the_hue_and_changes_the_contrast():
    turns, chroma, contrast = colours("full").unbind(-1)
    assert -0.2 - 1e-3 <= turns.min() < -0.18
    assert 0.18 < turns.max() <= 0.2 + 1e-3
    assert chroma.min() < 0.5  # saturation times contrast
    assert chroma.max() > 1.5
    assert contrast.min() < 0.6
    assert contrast.max() > 1.4
    assert torch.corrcoef(torch.stack([turns, contrast]))[0, 1].abs() < 0.3  # one draw for each


def test_what_leaves_the_range_is_clipped():
    image = torch.tensor([0, 255], dtype=torch.uint8).repeat(3, 8, 4)
    views = torch.stack([plain(8, "full")(image) for _ in range(50)])
    assert views.min() == -1
    assert views.max() == 1


def test_the_steps_come_in_every_order(monkeypatch):
    calls = []

    def step(name: str) -> distortion._Step:
        return distortion._Step(lambda image, _: calls.append(name) or image, 0, 1)  # type: ignore[func-returns-value]

    monkeypatch.setitem(distortion._STEPS, "full", tuple(step(name) for name in "bshc"))
    transform = plain(8, "full")
    orders = Counter[str]()
    for _ in range(480):
        transform(noise(1, 8, 8))
        orders["".join(calls)] += 1
        calls.clear()
    assert len(orders) == 24
    assert max(orders.values()) < 45


# --- chance, and the image


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_seed_decides_whatever_the_default_type(kind):
    image = noise(3, 40, 50)
    transform = training_transform(16, distortion=kind)
    torch.manual_seed(3)
    view = transform(image)
    assert not torch.equal(view, transform(image))
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    try:
        again = pickle.loads(pickle.dumps(transform))(image)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.dtype == torch.float32
    assert torch.equal(view, again)


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_stays_as_it_is(kind):
    image = noise(3, 28, 28)
    before = image.clone()
    plain(28, kind)(image)
    assert torch.equal(image, before)


# --- errors


@pytest.mark.parametrize(
    "area", [(0, 1), (-0.1, 0.5), (0.5, 0.2), (0.5, 1.1), (float("nan"), 1), (0.1, float("nan"))]
)
def test_an_area_that_is_no_share_is_an_error(area):
    with pytest.raises(ValueError, match="crop_area is"):
        training_transform(28, crop_area=area)


def test_a_size_below_one_is_an_error():
    with pytest.raises(ValueError, match="size is 0, expected at least 1"):
        training_transform(0)


def test_an_unknown_distortion_lists_the_known():
    with pytest.raises(ValueError, match="'fast', expected one of full, reduced, none"):
        training_transform(28, distortion="fast")  # type: ignore[arg-type]


def test_what_is_no_image_is_an_error():
    with pytest.raises(ValueError, match=r"not float32 \(1, 28, 28\)"):
        training_transform(28)(torch.zeros(1, 28, 28))
