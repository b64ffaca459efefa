"""Running statistics by torch's fused operators, where none of our kernels is: six launches, not twenty-six.

torch's own training step for mixed precision has what it takes: a check of several tensors that sets a flag, and a step
of the optimizer that is not made where it is set. A step of SGD at rate r with a weight decay of 1 along the gradient
-m is p - r·(p - m), the exponential average.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from batchnorm.kernels.call import Call


def track(call: Call, mean: Tensor, variance: Tensor, flag: Tensor) -> bool | Tensor | None:
    """Move the running statistics of `call` towards `mean` and `variance`, unbiased, unless one is not finite.

    flag: (1,) float32, 0; it becomes 1 where one is not.

    Returns: as dispatch.track; True where `call.skipped` was counted too; None, and nothing done, where these
    operators cannot: a rate that is a tensor or so large that the difference would be rounded, other dtypes.
    """
    assert call.running_mean is not None and call.running_var is not None
    running, rate = [call.running_mean, call.running_var], call.rate
    if not isinstance(rate, float) or rate >= 0.5 or flag.dtype != torch.float32:
        return None
    if mean.device.type not in ("cpu", "cuda"):  # others may lack them
        return None
    if any(each.dtype != mean.dtype or each.device != mean.device for each in running):
        return None
    one, levels = _constants(mean.device)
    torch._amp_foreach_non_finite_check_and_unscale_([mean, variance], flag, one)
    torch._fused_sgd_(
        running, [mean, variance], [], weight_decay=1.0, momentum=0.0, lr=rate, dampening=0.0, nesterov=False,
        maximize=True, is_first_step=False, grad_scale=None, found_inf=flag,
    )  # fmt: skip
    entered, skipped = flag.eq(levels).unbind()
    counters = [(call.batches, entered), (call.skipped, skipped)]
    counted = [
        (counter, by) for counter, by in counters if counter is not None and counter.device == mean.device
    ]
    if counted:
        torch._foreach_add_([counter for counter, _ in counted], [by for _, by in counted])
    return True if any(counter is call.skipped for counter, _ in counted) else entered


@lru_cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """A factor of 1, and the flag of what enters and of what does not."""
    return torch.ones(1, device=device), torch.tensor([0.0, 1.0], device=device)
