"""What a mask leaves out, in the terms of kernels that know no masks.

It is filled with each channel's mean of what the mask lets through, so that whatever is computed there is as
harmless as it is elsewhere; and where the kernels have counted it, it is taken out of the moments again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.moments import Moments, accumulator, channelwise


@dataclass(frozen=True)
class Padding:
    """The positions where `mask` is False, and with what they are filled; of each group, if there are any."""

    mask: Tensor  # see moments.positions
    valid: Tensor  # how many positions of a channel are no padding; broadcasts against (C,) or (groups, C)
    filling: Tensor  # (C,) or (groups, C), in the dtype of the input
    group: int

    @classmethod
    def of(cls, x: Tensor, mask: Tensor, group: int = 0) -> Padding:
        """That of `x`, (N, C, *S); groups of `group` samples, if it is not 0."""
        x = x.detach()
        mean = _over_positions(torch.where(mask, x, 0), accumulator(x.dtype))
        valid = _over_positions(mask, torch.int64)
        if group:
            which = reference.group_of(x, group)
            mean, valid = (reference.total_of_groups(values, which, group) for values in (mean, valid))
        else:
            mean, valid = mean.sum(0), valid.sum(0)
            valid = valid[0] if mask.size(1) == 1 else valid
        return cls(mask, valid, (mean / valid.clamp(min=1)).to(x.dtype), group)

    def fill(self, x: Tensor) -> Tensor:
        filling = self.filling[reference.group_of(x, self.group)] if self.group else self.filling
        return torch.where(self.mask, x, channelwise(filling, x))

    def dominates(self, x: Tensor) -> bool:
        """Whether taking it out again would lose digits: those of float64, or, where there is much of it, any."""
        if x.dtype == torch.float64:  # the sums have no digits to spare
            return True
        return bool((self.valid * 64 < reference.count(x, self.group)).any())

    def remove_from(self, whole: Moments) -> Moments:
        """The moments without the filling: the inverse of `merge`, for a part without spread."""
        filled = whole.count - self.valid
        distance = whole.mean - self.filling
        share = 1 / self.valid.clamp(min=1).to(whole.mean.dtype)
        mean = whole.mean + distance * (filled * share)
        m2 = whole.m2 - distance.square() * (filled * whole.count * share)
        # on a CPU the number is known at once
        return Moments(self.valid if self.valid.dim() else int(self.valid), mean, m2.clamp(min=0))


def _over_positions(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ of each sample and channel, (N, C)."""
    return values.to(dtype) if values.dim() == 2 else values.sum(list(range(2, values.dim())), dtype=dtype)
