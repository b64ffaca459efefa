"""What a mask leaves out, in the terms of kernels that know no masks.

It is filled with each channel's mean of what the mask lets through, and afterwards the filling is taken out of the
moments again, which loses nothing, for it is near their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.moments import Moments, accumulator, batch_dims, channelwise


@dataclass(frozen=True)
class Padding:
    """The positions where `mask` is False, and with what they are filled; of each group, if there are any."""

    mask: Tensor  # see moments.positions
    valid: Tensor  # how many positions of a channel are no padding; broadcasts against (C,) or (groups, C)
    filling: Tensor  # (C,) or (groups, C), in the dtype of the input
    group: int

    @classmethod
    def of(cls, x: Tensor, mask: Tensor, group: int) -> Padding:
        """That of `x`, (N, C, *S), which is 0 there."""
        if group:
            found = reference.moments(x, mask, group)
            return cls(mask, torch.as_tensor(found.count), found.mean.to(x.dtype), group)
        dims = batch_dims(x)
        valid = mask.sum(dims) if mask.size(1) == x.size(1) > 1 else mask.sum()
        mean = x.sum(dims, dtype=accumulator(x.dtype)) / valid.clamp(min=1)
        return cls(mask, valid, mean.to(x.dtype), group)

    def fill(self, x: Tensor) -> Tensor:
        filling = self.filling[reference.group_of(x, self.group)] if self.group else self.filling
        return torch.where(self.mask, x, channelwise(filling, x))

    def taken_out_of(self, whole: Moments) -> Moments:
        """The moments without the filling: the inverse of `merge`, for a part without spread."""
        filled = whole.count - self.valid
        distance = whole.mean - self.filling
        share = 1 / self.valid.clamp(min=1).to(whole.mean.dtype)
        mean = whole.mean + distance * (filled * share)
        m2 = whole.m2 - distance.square() * (filled * whole.count * share)
        # on a CPU the number is known at once
        return Moments(self.valid if self.valid.dim() else int(self.valid), mean, m2.clamp(min=0))
