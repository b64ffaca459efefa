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
    """The statistics of each channel of a batch: number of values, mean, sum of squared deviations from the mean.

    Those of several groups side by side are (groups, C) and broadcast against a count of (groups, 1). In the letters of
    Ioffe & Szegedy 2015, algorithm 1: count is m, mean is μ_B, m2 is m·σ²_B.

    Args:
        count: number of values per channel, an int (or a tensor when it is only known at run time, (C,) where
            channels differ); 0 is legal and says nothing, whatever `mean` and `m2` are.
        mean: (C,) their mean, in the unit of the input; `Moments.of` makes it float64 (float32 on MPS).
        m2: (C,) the sum of (x - mean)², in that unit squared: count times the biased variance; of mean's dtype.

    Example:
        >>> import torch, batchnorm as bn
        >>> moments = bn.Moments(4, mean=torch.tensor([2.0]), m2=torch.tensor([12.0]))
        >>> moments.variance(), moments.variance(unbiased=True)
        (tensor([3.]), tensor([4.]))
    """

    count: int | Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> Moments:
        """The moments of each channel of `x`, in float64 (Ioffe & Szegedy 2015, algorithm 1, lines 1-2).

            shift = a first mean, rounded       delta = mean(x - shift)
            mean  = shift + delta               m2    = Σ (x - shift - delta)²

        Sums run in float32 or wider over values that were centred first, so nothing cancels: at mean 1e4
        and standard deviation 1 in float32 the mean is right to about 1e-10. E[x²] - E[x]² is never formed.
        Differentiable, twice.

        Args:
            x: (N, C, *S), float16, bfloat16, float32 or float64.
            mask: bool, broadcastable to (N, 1, *S); only positions where it is True are counted. Or the lengths of
                sequences, (N,) integers, for an `x` of (N, C, L). None counts every position.

        Returns: the moments, mean and m2 of shape (C,) and float64 (float32 on MPS); count is N·|S|, or with a mask the
            number of positions that it leaves, a 0-dimensional tensor.

        Raises:
            NotImplementedError: `x` is not floating point.
            IndexError: `x` has fewer than 2 dimensions.
            TypeError: `mask` is neither bool nor lengths.
            ValueError: `mask` does not broadcast to (N, 1, *S), or a length is not from 0 to L.

        Example:
            >>> import torch, batchnorm as bn
            >>> moments = bn.Moments.of(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
            >>> moments.count, moments.mean.tolist(), moments.m2.tolist()
            (2, [2.0, 10.0], [2.0, 0.0])
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

        Args:
            others: moments of the other parts, mean and m2 of the same shape as this one's.

        Returns: the moments of all parts; count is an int, or a tensor where that of a part is one.

        Raises:
            ValueError: the parts do not describe the same channels.

        Example:
            >>> import torch, batchnorm as bn
            >>> x = torch.arange(12.0).reshape(6, 2)
            >>> merged = bn.Moments.of(x[:2]).merge(bn.Moments.of(x[2:]))
            >>> torch.allclose(merged.m2, bn.Moments.of(x).m2)
            True
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
        """`merge` of moments that lie side by side: the first dimension of `mean` and `m2`, which `count` has too.

        Returns: the moments of all groups together, of one dimension less: (C,) from (groups, C).

        Example:
            >>> import torch, batchnorm as bn
            >>> of_groups = bn.Moments(torch.tensor([[1], [3]]), torch.tensor([[0.0], [4.0]]), torch.zeros(2, 1))
            >>> whole = of_groups.total()
            >>> int(whole.count), whole.mean.tolist(), whole.m2.tolist()
            (4, [3.0], [12.0])
        """
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
        """The variance of each channel: m2 / count, or m2 / (count - 1) with `unbiased` (Bessel's correction).

        Normalising uses the biased one (Ioffe & Szegedy 2015, algorithm 1), running statistics the unbiased one
        (algorithm 2, line 10).

        Args:
            unbiased: divide by count - 1 instead of count.

        Returns: (C,) of m2's dtype; nan where the divisor is 0: no values, or one value and `unbiased`.

        Example:
            >>> import torch, batchnorm as bn
            >>> moments = bn.Moments.of(torch.tensor([[1.0], [3.0]]))
            >>> moments.variance().item(), moments.variance(unbiased=True).item()
            (1.0, 2.0)
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
    """The affine map that a normalisation applies to each channel: y = scale·x + shift.

    Args:
        scale: (C,) in float32 or wider; `Affine.of` makes it float64 (float32 on MPS).
        shift: (C,) of the same dtype.

    Example:
        >>> import torch, batchnorm as bn
        >>> affine = bn.Affine(scale=torch.tensor([2.0]), shift=torch.tensor([1.0]))
        >>> affine(torch.tensor([[3.0]]))
        tensor([[7.]])
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, moments: Moments, weight: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
        """The affine map that normalises by `moments` (Ioffe & Szegedy 2015, algorithm 1, lines 3-4).

            scale = weight / √(variance + eps)      shift = bias - scale·mean

        The variance is the biased one and eps stands inside the root. With population statistics in place of the
        batch's it is algorithm 2, line 11.

        Args:
            moments: of the batch, mean and m2 of shape (C,).
            weight: (C,) the paper's γ; None stands for 1.
            bias: (C,) the paper's β; None stands for 0.
            eps: added to the variance, inside the root; in the unit of the input squared.

        Returns: the map, with scale and shift of shape (C,) and float64 (float32 on MPS).

        Example:
            >>> import torch, batchnorm as bn
            >>> x = torch.tensor([[1.0], [3.0]])
            >>> affine = bn.Affine.of(bn.Moments.of(x), weight=None, bias=None, eps=0.0)
            >>> affine.scale.item(), affine.shift.item(), affine(x).tolist()
            (1.0, -2.0, [[-1.0], [1.0]])
        """
        return cls.normalising(moments.mean, moments.variance(), weight, bias, eps)

    @classmethod
    def normalising(
        cls, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Affine:
        """`Affine.of` for a mean and a variance that are already known, such as running statistics.

        Args:
            mean: (C,) any floating dtype.
            variance: (C,) any floating dtype.
            weight: (C,) the paper's γ; None stands for 1.
            bias: (C,) the paper's β; None stands for 0.
            eps: added to the variance, inside the root.

        Returns: the map, as from `Affine.of` (Ioffe & Szegedy 2015, algorithm 2, line 11).

        Example:
            >>> import torch, batchnorm as bn
            >>> layer = bn.BatchNorm1d(2).eval()
            >>> affine = bn.Affine.normalising(
            ...     layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps
            ... )
            >>> x = torch.randn(3, 2)
            >>> torch.allclose(affine(x), layer(x), atol=1e-6)
            True
        """
        scale = torch.rsqrt(variance.to(statistics_dtype(mean.device)) + eps)
        if weight is not None:
            scale = scale * weight
        shift = mean * scale
        return cls(scale, -shift if bias is None else bias - shift)

    def compose(self, inner: Affine) -> Affine:
        """The affine map x ↦ self(inner(x)): how a normalisation is folded into its neighbour.

        Args:
            inner: the map that is applied first, of the same channels.

        Returns: one map, with scale = self.scale·inner.scale and shift = self.scale·inner.shift + self.shift.

        Example:
            >>> import torch, batchnorm as bn
            >>> twice = bn.Affine(torch.tensor([2.0]), torch.tensor([0.0]))
            >>> add_one = bn.Affine(torch.tensor([1.0]), torch.tensor([1.0]))
            >>> twice.compose(add_one)(torch.tensor([[3.0]]))
            tensor([[8.]])
        """
        return Affine(self.scale * inner.scale, self.scale * inner.shift + self.shift)

    def __call__(self, x: Tensor, about: Tensor | None = None) -> Tensor:
        """y = scale·x + shift along dimension 1 of `x`, in x's dtype.

        Computed as scale·(x - about) + (shift + scale·about), which does not cancel when `about` is near x or near the
        point where the line crosses zero: at a mean of 1e4, scale·x and shift would be two large numbers of opposite
        sign.

        Args:
            x: (N, C, *S), float16, bfloat16, float32 or float64; computed in float32 or wider.
            about: (C,) the point about which the line is evaluated; None: where it crosses zero.

        Returns: y, in the shape and dtype of `x`.

        Raises:
            NotImplementedError: `x` is not floating point.

        Example:
            >>> import torch, batchnorm as bn
            >>> affine = bn.Affine(torch.tensor([2.0, 1.0]), torch.tensor([0.0, -5.0]))
            >>> affine(torch.tensor([[1.0, 5.0]]))
            tensor([[2., 0.]])
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
