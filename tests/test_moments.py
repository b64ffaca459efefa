"""`Moments` against float64 numpy and `Affine` against its formula, where values are large, few or absent."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from batchnorm import Affine, Moments
from tests.mutations.mutation import Mutation

SHAPES = [(6, 3), (1, 3, 7), (2, 3, 4, 5), (2, 3, 2, 3, 2)]


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def numpy_moments(x, keep=None):
    """Count, mean and m2 of each channel by numpy, in float64 and in two passes."""
    channels = np.moveaxis(x.double().numpy(), 1, 0).reshape(x.size(1), -1)
    channels = channels if keep is None else channels[:, keep.numpy().ravel()]
    mean = channels.mean(1)
    return channels.shape[1], mean, ((channels - mean[:, None]) ** 2).sum(1)


# --- Moments.of


@pytest.mark.parametrize("mean", [0, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moments_of_a_batch(dtype, shape, mean):
    mean = min(mean, torch.finfo(dtype).max / 2)
    x = (torch.randn(shape) + mean).to(dtype)
    moments = Moments.of(x)
    count, expected_mean, expected_m2 = numpy_moments(x)
    assert moments.count == count
    assert moments.mean.dtype == moments.m2.dtype == torch.float64
    # Differences between neighbours are exact in float32; what is left is the rounding of sums of the order of std.
    relative = 1e-14 if dtype == torch.float64 else 1e-6
    std = math.sqrt(expected_m2.max() / count)
    np.testing.assert_allclose(moments.mean.numpy(), expected_mean, atol=relative * std, rtol=1e-15)
    np.testing.assert_allclose(moments.m2.numpy(), expected_m2, rtol=10 * relative, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_counts_only_what_is_true(shape):
    x = torch.randn(shape, dtype=torch.float64) + 1e4
    keep = torch.rand(shape[0], 1, *shape[2:]) < 0.6
    keep.view(-1)[0] = True
    moments = Moments.of(torch.where(keep, x, torch.nan), mask=keep)  # what is not counted may be anything
    count, mean, m2 = numpy_moments(x, keep)
    assert moments.count == count
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=1e-14)
    np.testing.assert_allclose(moments.m2.numpy(), m2, rtol=1e-9)


def test_a_mask_is_broadcast_over_positions():
    x = torch.randn(4, 3, 5)
    keep = torch.tensor([True, False, True, True]).reshape(4, 1, 1)
    masked, picked = Moments.of(x, mask=keep), Moments.of(x[keep.flatten()])
    assert masked.count == picked.count
    assert_close((masked.mean, masked.m2), (picked.mean, picked.m2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 2, 2)])
def test_moments_of_any_shape_merge(shape):
    values = torch.randn(7, *shape, dtype=torch.float64)

    def of(part):
        return Moments(len(part), part.mean(0), (part - part.mean(0)).square().sum(0))

    merged, whole = of(values[:2]).merge(of(values[2:3]), of(values[3:])), of(values)
    assert merged.count == 7
    assert_close((merged.mean, merged.m2), (whole.mean, whole.m2))


def test_the_gradient_of_a_masked_mean_is_exact_in_float64():
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[True], [True], [False], [True]])
    Moments.of(x, mask=keep).mean.sum().backward()
    assert_close(x.grad, keep.expand(4, 2).double() / 3, rtol=1e-15, atol=0)


def test_a_mask_that_keeps_nothing_has_count_zero():
    moments = Moments.of(torch.randn(4, 3), mask=torch.zeros(4, 1, dtype=torch.bool))
    assert moments.count == 0
    assert moments.variance().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.long])
def test_a_mask_must_be_bool(dtype):
    with pytest.raises(TypeError, match="bool"):
        Moments.of(torch.randn(4, 3), mask=torch.ones(4, 1, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "of_mask"),
    [
        ((4, 3), (4,)),
        ((4, 3), (4, 3)),
        ((4, 3), (2, 1)),
        ((4, 3), (1, 4, 1)),
        ((4, 3, 5), (4, 5)),  # the usual one, of a padded sequence: its channel dimension is missing
        ((4, 3, 5), (4, 3, 5)),
        ((4, 3, 5), (4, 1, 4)),
    ],
)
def test_a_mask_of_another_shape_is_refused(shape, of_mask):
    with pytest.raises(ValueError, match=r"mask must broadcast to \(N, 1, \*S\) .*mask\.unsqueeze\(1\)"):
        Moments.of(torch.randn(shape), mask=torch.ones(of_mask, dtype=torch.bool))


@pytest.mark.parametrize("under", [math.nan, math.inf, -math.inf, 1e308])
@pytest.mark.parametrize("some", [True, False], ids=["some", "all"])
def test_what_is_under_the_mask_reaches_no_gradient(under, some):
    # 0 times nan is nan: a value that is not counted must be replaced before anything is computed from it.
    keep = torch.tensor([some, False, some, some]).reshape(4, 1, 1)
    values = torch.randn(4, 3, 2, dtype=torch.float64)

    def asked(filler):
        x = torch.where(keep, values, filler).requires_grad_()
        moments = Moments.of(x, mask=keep)
        (first,) = torch.autograd.grad((moments.mean.exp() + moments.m2.square()).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return moments.mean, moments.m2, first, second

    found = asked(under)
    assert all(t.isfinite().all() for t in found)
    assert_close(found, asked(0.5), rtol=0, atol=0)
    for gradient in found[2:]:
        assert (gradient[~keep.flatten()] == 0).all()
        assert gradient[keep.flatten()].all()


def test_a_large_mean_does_not_overflow_under_the_mask():
    # (0 - mean)² is inf there in float32, and inf times 0 would be nan
    x, keep = torch.full((4, 3), 2.0**100), torch.tensor([True, False, True, False]).reshape(4, 1)
    x[1] = torch.nan
    moments = Moments.of(x, mask=keep)
    assert_close(moments.mean, x[0].double(), rtol=0, atol=0)
    assert_close(moments.m2, torch.zeros(3).double(), rtol=0, atol=0)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, dtype=torch.bool)], ids=["plain", "masked"])
@pytest.mark.parametrize("shape", [(4, 3), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.long, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2])
def test_moments_of_what_is_not_a_real_number_are_refused(dtype, shape, mask):
    with pytest.raises(NotImplementedError, match=rf"{dtype}: .*input\.float\(\)"):
        Moments.of(torch.ones(shape).to(dtype), mask=mask)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_moments_need_channels(shape):
    with pytest.raises(IndexError, match=r"expected \(N, C, \.\.\.\), got shape \(.*unsqueeze"):
        Moments.of(torch.randn(shape))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (2, 3, 0)])
def test_an_empty_batch_has_count_zero(shape):
    moments = Moments.of(torch.empty(shape))
    assert moments.count == 0
    assert moments.mean.shape == moments.m2.shape == (3,)


# --- Moments.merge


@st.composite
def splits(draw):
    """A batch, (n, 2), and the moments of the parts it is cut into, in any order."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    mean = draw(st.sampled_from([0.0, -3.0, 1e4, 1e6]))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn(sum(sizes), 2, generator=noise, dtype=torch.float64) + mean
    parts = [Moments.of(part) for part in x.split(sizes)]
    garbage = draw(st.sampled_from([0.0, 1e300, math.inf, math.nan]))
    # A part with count 0 says nothing, whatever stands in it: an unused layer, a rank without data.
    empty = Moments(0, vector(garbage, 1), vector(1, garbage))
    parts = [part if part.count else empty for part in parts]
    return x, draw(st.permutations(parts))


def assert_same(a, b, x):
    assert a.count == b.count == len(x)
    if not len(x):
        return  # a count of 0 leaves mean and m2 without meaning
    size = x.abs().max().item()
    assert_close(a.mean, b.mean, rtol=0, atol=1e-15 * size)
    # The means are known to 1e-16 of their size, and m2 sums n squares of differences from them.
    assert_close(a.m2, b.m2, rtol=1e-12, atol=1e-15 * size * len(x))


@given(splits())
def test_merged_parts_are_the_whole(split):
    x, parts = split
    assert_same(parts[0].merge(*parts[1:]), Moments.of(x), x)


@given(splits(), st.integers(0, 6))
def test_merge_is_associative(split, cut):
    x, parts = split
    all_at_once = parts[0].merge(*parts[1:])
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = one_by_one.merge(part)
    assert_same(one_by_one, all_at_once, x)
    left, right = parts[: cut % len(parts)], parts[cut % len(parts) :]
    nested = right[0].merge(*right[1:])
    assert_same(left[0].merge(*left[1:], nested) if left else nested, all_at_once, x)


def test_merge_with_counts_known_at_run_time():
    x = torch.randn(9, 3, dtype=torch.float64)
    first, second = Moments.of(x[:4]), Moments.of(x[4:])
    merged = Moments(torch.tensor(4), first.mean, first.m2).merge(second)
    assert isinstance(merged.count, torch.Tensor)
    assert_same(merged, Moments.of(x), x)
    assert isinstance(first.merge(second).count, int)


def test_merge_with_nothing_is_the_same():
    x = torch.randn(5, 3, dtype=torch.float64)
    assert_same(Moments.of(x).merge(), Moments.of(x), x)


def test_merge_refuses_other_channels():
    with pytest.raises(ValueError, match=r"\(3,\), \(4,\)"):
        Moments.of(torch.randn(5, 3)).merge(Moments.of(torch.randn(5, 4)))


# --- Moments.variance


@pytest.mark.parametrize("as_count", [int, torch.tensor])
@pytest.mark.parametrize(
    ("count", "biased", "unbiased"),
    [(0, math.nan, math.nan), (1, 6.0, math.nan), (2, 3.0, 6.0), (4, 1.5, 2.0)],
)
def test_variance_divides_by_the_count_or_by_one_less(count, biased, unbiased, as_count):
    moments = Moments(as_count(count), torch.zeros(2), torch.tensor([6.0, 6.0]))
    assert_close(moments.variance(), torch.full((2,), biased), equal_nan=True, rtol=0, atol=0)
    assert_close(moments.variance(unbiased=True), torch.full((2,), unbiased), equal_nan=True, rtol=0, atol=0)


def test_variance_of_one_value_is_zero():
    assert Moments.of(torch.tensor([[3.0]])).variance() == 0


# --- Affine


@pytest.mark.parametrize(
    ("weight", "bias", "scale", "shift"),
    [
        (None, None, 1 / 3, -5 / 3),
        (6.0, None, 2.0, -10.0),
        (None, 1.0, 1 / 3, 1 - 5 / 3),
        (6.0, 1.0, 2.0, -9.0),
    ],
)
def test_the_affine_map_of_moments(weight, bias, scale, shift):
    # mean 5, biased variance 16/2 = 8, and eps = 1 within the root makes it √9
    moments = Moments(2, vector(5.0), vector(16.0))
    made = Affine.of(
        moments, None if weight is None else vector(weight), None if bias is None else vector(bias), eps=1.0
    )
    assert_close((made.scale, made.shift), (vector(scale), vector(shift)))


def test_compose_applies_the_inner_map_first():
    outer, inner = Affine(vector(2, -3), vector(1, 0.5)), Affine(vector(5, 0.25), vector(-7, 11))
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    assert_close(outer.compose(inner)(x), outer(inner(x)))
    assert_close(outer.compose(inner).shift, vector(2 * -7 + 1, -3 * 11 + 0.5))


@pytest.mark.parametrize("about", [None, 0.0, 1e4, -3.0])
@pytest.mark.parametrize(
    ("scale", "shift"),
    [
        (0.0, 2.0),
        (0.0, 0.0),
        (-1.0, 0.0),
        (1e-3, 1e4),
        (1.0, -1e4),  # a mean of 1e4: scale·x and shift cancel
        (1e-20, 3.0),
        (1e-40, 3.0),  # weight decay leaves such weights; the line crosses zero beyond float32
        (1.0, 1e30),
        (1e-45, -1e30),
    ],
)
def test_the_affine_map_applied(scale, shift, about):
    affine = Affine(vector(scale, 1.0), vector(shift, 0.0))
    x = torch.randn(5, 2, 3) + 1e4
    expected = x.double() * affine.scale.reshape(2, 1) + affine.shift.reshape(2, 1)
    y = affine(x, None if about is None else vector(about, 0.0))
    assert y.dtype == torch.float32
    # Off 0 by rounding only, unless the caller's point is far from x and from where the line crosses zero.
    far = about is not None and abs(about - 1e4) > 100
    absolute = 1e-7 * (abs(scale) * 1e4 + abs(shift)) if far else 1e-12
    assert_close(y.double(), expected, rtol=3e-7, atol=absolute)


@pytest.mark.parametrize(
    ("scale", "shift"), [(math.nan, 0.0), (1.0, math.nan), (1.0, math.inf), (math.inf, 1.0)]
)
def test_a_map_that_is_not_finite_shows(scale, shift):
    y = Affine(vector(scale, 1.0), vector(shift, 0.0))(torch.ones(3, 2))
    assert not y[:, 0].isfinite().any()
    assert y[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float8_e4m3fn])
def test_a_map_is_not_applied_to_integers(dtype):
    # the output has x's dtype: it would be cut off
    with pytest.raises(NotImplementedError, match=rf"{dtype}: .*input\.float\(\)"):
        Affine(torch.ones(3), torch.ones(3))(torch.ones(4, 3).to(dtype))


# --- gradients


def layer(x, weight, bias):
    moments = Moments.of(x)
    return Affine.of(moments, weight, bias, 1e-5)(x, about=moments.mean)


def merged(x, weight, bias):
    moments = Moments.of(x[:2]).merge(Moments.of(x[2:]))
    return Affine.of(moments, weight, bias, 1e-5).compose(Affine(weight, bias))(x)


def masked(x, weight, bias):
    keep = torch.tensor([True, True, False, True]).reshape(4, 1, 1)
    return Affine.of(Moments.of(x, mask=keep), weight, bias, 1e-5)(x)


@pytest.mark.parametrize("function", [layer, merged, masked])
def test_differentiable_twice(function):
    arguments = [
        torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in [(4, 2, 2), (2,), (2,)]
    ]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


MUTATIONS = [
    Mutation(
        "mask of any shape", "moments.py",
        "if mask.dim() != x.dim() or any(", "if False and any(",
        "a missing channel dimension is torch's riddle of an error",
    ),
]  # fmt: skip
