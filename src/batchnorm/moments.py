"""`Moments` and `Affine`, the two values everything in this library passes around.

    Moments(count, mean, m2) is what a batch says;  Affine(scale, shift) is what a layer does.
    layer = normalise by the moments of x  ·  sync = merge moments over ranks  ·  ghost = one Moments per group
    population = merge moments over batches  ·  fold = compose an Affine into the neighbour
    Nearly every module of the library is one of these verbs.

Letters, here and everywhere: an input `x` has shape (N, C, *S), N samples of C channels at the positions S;
a channel's statistics are taken over N and S, so `count` is N·|S|, the m' = m·p·q of the paper's section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

# What accumulates a sum over a batch, by the dtype of the input: never narrower than float32.
_ACCUMULATORS = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which inputs of `dtype` are summed and normalised: float32, or float64 for float64.

    Raises: NotImplementedError for what is not one of float16, bfloat16, float32, float64, as torch does.
    """
    if dtype not in _ACCUMULATORS:
        raise NotImplementedError(
            f'"batch_norm" not implemented for {dtype}: convert the input first, e.g. input.float()'
        )
    return _ACCUMULATORS[dtype]


def statistics_dtype(device: torch.device) -> torch.dtype:
    """The dtype of per-channel values: float64, for a mean of 1e4 in float32 is already off by 5e-4.

    C numbers cost nothing beside the batch they describe. MPS has no float64 and keeps float32.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def channelwise(values: Tensor, x: Tensor) -> Tensor:
    """View `values`, (C,) or (N, C), so that they broadcast along the channels of `x`, (N, C, *S)."""
    return values if x.dim() == 2 else values.reshape(*values.shape, *[1] * (x.dim() - 2))


def batch_dims(x: Tensor) -> list[int]:
    """The dimensions of `x`, (N, C, *S), over which a channel's statistics are taken: all but the second."""
    return [0, *range(2, x.dim())]


def positions(mask: Tensor, x: Tensor) -> Tensor:
    """`mask` as a bool tensor of shape (N, 1, *S) for `x`, (N, C, *S): True where it is counted.

    Raises: TypeError or ValueError for a mask that is not what `Moments.of` says.
    """
    if not isinstance(cast(object, mask), Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}: use torch.as_tensor(mask)")
    if mask.dtype in (torch.int64, torch.int32) and x.dim() == 3 and mask.shape == x.shape[:1]:
        _check_lengths(mask, x)
        return (torch.arange(x.size(2), device=x.device) < mask[:, None])[:, None]
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be a bool tensor (True = counted), got {mask.dtype}: use mask.bool(), "
            "or the lengths of sequences, (N,) integers, for an input of (N, C, L)"
        )
    per_position = (x.size(0), 1, *x.shape[2:])
    if mask.dim() != x.dim() or any(m not in (1, n) for m, n in zip(mask.shape, per_position, strict=True)):
        raise ValueError(
            f"mask must broadcast to (N, 1, *S) of the input {tuple(x.shape)}, got {tuple(mask.shape)}: "
            "give it a channel dimension of 1, e.g. with mask.unsqueeze(1)"
        )
    return mask.expand(per_position)


def _check_lengths(lengths: Tensor, x: Tensor) -> None:
    """Refuse lengths that `x` cannot have, where they are known without waiting for a device."""
    if (
        not lengths.is_cpu
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or not lengths.numel()
    ):
        return
    if lengths.min() < 0 or lengths.max() > x.size(2):
        raise ValueError(f"lengths must be from 0 to {x.size(2)}, the input's, got {lengths.tolist()}")


def count_per_channel(x: Tensor) -> int:
    """How many values each channel of `x`, (N, C, *S), has: N·|S|."""
    return x.numel() // x.size(1) if x.size(1) else 0


@dataclass(frozen=True, eq=False)
class Moments:
    """What a batch says of each channel: how many values, their mean, their squared deviations from it.

    count: number of values per channel, an int (or a tensor when it is only known at run time, (C,) where channels
        differ); 0 is legal and says nothing, whatever `mean` and `m2` are.
    mean: (C,) their mean.
    m2: (C,) the sum of (x - mean)²: count times the biased variance.

    Those of several groups side by side are (groups, C) and broadcast against a count of (groups, 1).
    """

    count: int | Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> Moments:
        """The moments of each channel of `x`, (N, C, *S), in float64 (Ioffe & Szegedy 2015, alg. 1, lines 1-2).

            shift = a first mean, rounded       delta = mean(x - shift)
            mean  = shift + delta               m2    = Σ (x - shift - delta)²

        Sums run in float32 or wider over values that were centred first, so nothing cancels: at mean 1e4
        and standard deviation 1 in float32 the mean is right to about 1e-10. E[x²] - E[x]² is never formed.
        Differentiable, twice.

        mask: bool, broadcastable to (N, 1, *S); only positions where it is True are counted. Or the lengths of
            sequences, (N,) integers, for an `x` of (N, C, L).

        Raises: NotImplementedError for an input that is not floating point; IndexError for one without channels;
            TypeError or ValueError for a mask that is not bool or not of that shape.
        """
        if x.dim() < 2:
            raise IndexError(
                f"expected (N, C, ...), got shape {tuple(x.shape)}: add the missing dimension with unsqueeze"
            )
        if mask is not None:
            return of_masked(x, positions(mask, x))
        wide, dims = statistics_dtype(x.device), batch_dims(x)
        count = count_per_channel(x)
        x = x.to(accumulator(x.dtype))
        if count == 0:
            empty = x.sum(dims).to(wide)  # a sum over nothing: zeros that are still part of x's graph
            return cls(0, empty, empty.clone())
        shift = x.detach().mean(dims)  # any constant near the mean will do, so no gradient flows through it
        centred = x - channelwise(shift, x)
        delta = centred.mean(dims)
        m2 = (centred - channelwise(delta, x)).square().sum(dims)
        return cls(count, shift.to(wide) + delta, m2.to(wide))

    def merge(self, *others: Moments) -> Moments:
        """The moments of all the values together, however they were split (Chan, Golub & LeVeque 1979).

            count = Σ nᵢ      mean = Σ nᵢ·meanᵢ / count      m2 = Σ m2ᵢ + Σ nᵢ·(meanᵢ - mean)²

        Associative and free of order up to rounding; parts with count 0 change nothing.

        Raises: ValueError when the parts do not describe the same channels.
        """
        parts = (self, *others)
        if any(part.mean.shape != self.mean.shape for part in others):
            shapes = ", ".join(str(tuple(part.mean.shape)) for part in parts)
            raise ValueError(f"cannot merge moments of different channels: the means have shapes {shapes}")
        counts = [torch.as_tensor(part.count, device=part.mean.device) for part in parts]
        total = Moments(
            torch.stack([count.expand_as(self.mean) for count in counts]),
            torch.stack([part.mean for part in parts]),
            torch.stack([part.m2 for part in parts]),
        ).total()
        if any(count.dim() for count in counts):
            return total
        return Moments(sum(part.count for part in parts), total.mean, total.m2)

    def total(self) -> Moments:
        """`merge` of moments that lie side by side: the first dimension of `mean` and `m2`, which `count` has too."""
        assert isinstance(self.count, Tensor)
        weight = self.count.to(self.mean.dtype)
        mean, m2 = torch.where(weight > 0, self.mean, 0), torch.where(weight > 0, self.m2, 0)
        # deviations from one of the means: the means may all be large and close
        heaviest = weight.expand_as(mean).argmax(0, keepdim=True)
        origin = mean.gather(0, heaviest).squeeze(0)
        merged = origin + ((mean - origin) * weight).sum(0) / weight.sum(0).clamp(min=1)
        spread = torch.where(weight > 0, mean - merged, 0).square() * weight
        count = self.count.sum(0)
        return Moments(count.squeeze() if count.numel() == 1 else count, merged, (m2 + spread).sum(0))

    def variance(self, unbiased: bool = False) -> Tensor:
        """(C,) variance: m2 / count, or m2 / (count - 1) with `unbiased` (Bessel's correction).

        Normalising uses the biased one (alg. 1), running statistics the unbiased one (alg. 2, line 10).
        nan where the divisor is 0: no values, or one value and `unbiased`.
        """
        divisor = self.count - 1 if unbiased else self.count
        if isinstance(divisor, Tensor):
            return torch.where(divisor > 0, self.m2 / divisor, torch.nan)
        return self.m2 / divisor if divisor > 0 else torch.full_like(self.m2, torch.nan)


def of_masked(x: Tensor, mask: Tensor) -> Moments:
    """`Moments.of` for a mask as `positions` returns it, or one of (N, C, *S), which has a count for each channel."""
    wide, dims = statistics_dtype(x.device), batch_dims(x)
    count = mask.sum(dims) if mask.size(1) == x.size(1) > 1 else mask.sum()
    share = 1 / count.clamp(min=1).to(accumulator(x.dtype))

    def total(values: Tensor) -> Tensor:
        # where, not a product: under the mask the square of a large mean may be inf
        return torch.where(mask, values, 0).sum(dims)

    x = torch.where(mask, x.to(accumulator(x.dtype)), 0)  # a nan may not reach the gradient
    shift = total(x.detach()) * share
    centred = x - channelwise(shift, x)
    delta = total(centred) * share
    m2 = total((centred - channelwise(delta, x)).square())
    return Moments(count, shift.to(wide) + delta, m2.to(wide))


@dataclass(frozen=True, eq=False)
class Affine:
    """What a normalisation does to each channel: y = scale·x + shift, with (C,) `scale` and `shift`."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, moments: Moments, weight: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
        """The affine map that normalises by `moments` (Ioffe & Szegedy 2015, alg. 1, lines 3-4; alg. 2, line 11).

            scale = weight / √(variance + eps)      shift = bias - scale·mean

        The variance is the biased one and eps stands inside the root. `weight` (the paper's γ) and `bias`
        (β) are (C,) or None, which stand for 1 and 0.
        """
        return cls.normalising(moments.mean, moments.variance(), weight, bias, eps)

    @classmethod
    def normalising(
        cls, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Affine:
        """`Affine.of` for a mean and a variance that are already known, such as running statistics."""
        scale = torch.rsqrt(variance.to(statistics_dtype(mean.device)) + eps)
        if weight is not None:
            scale = scale * weight
        shift = mean * scale
        return cls(scale, -shift if bias is None else bias - shift)

    def compose(self, inner: Affine) -> Affine:
        """The affine map x ↦ self(inner(x))."""
        return Affine(self.scale * inner.scale, self.scale * inner.shift + self.shift)

    def __call__(self, x: Tensor, about: Tensor | None = None) -> Tensor:
        """y = scale·x + shift along dimension 1 of `x`, (N, C, *S), in x's dtype.

        Computed as scale·(x - about) + (shift + scale·about), which does not cancel when `about`, (C,), is
        near x or near the point where the line crosses zero, its default: at a mean of 1e4, scale·x and shift
        would be two large numbers of opposite sign.
        """
        dtype = accumulator(x.dtype)
        if about is None:
            with torch.no_grad():  # y does not depend on it, so neither does its gradient
                # beyond dtype, where a weight has all but decayed to 0: any other point does
                about = torch.nan_to_num((-self.shift / self.scale).to(dtype), nan=0, posinf=0, neginf=0)
        about = about.detach().to(dtype)
        rest = (self.shift + self.scale * about).to(dtype)
        centred = x.to(dtype) - channelwise(about, x)
        y = torch.addcmul(channelwise(rest, x), centred, channelwise(self.scale.to(dtype), x))
        return y.to(x.dtype)
