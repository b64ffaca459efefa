"""The mean of tensors over all processes, by one all_reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_processes(tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Replace `tensors`, in place, by their mean over all processes, by one all_reduce in `dtype`."""
    joined = torch.cat([tensor.to(dtype).flatten() for tensor in tensors])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    for tensor, part in zip(tensors, joined.split([each.numel() for each in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
