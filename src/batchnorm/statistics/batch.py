"""The seam: a layer hands over its batch, an object normalises it by moments of its choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from batchnorm import functional
from batchnorm.kernels.call import Activation, Call, Exchange
from batchnorm.layer_path import Name
from batchnorm.moments import Moments


@dataclass(frozen=True, eq=False)
class Batch:
    """A training batch that came to a layer, and the layer.

    input: (N, C, *S), and residual as that; mask: (N, 1, *S) or (N, C, *S), see moments.positions.
    weight, bias, running_mean, running_var: (C,) each, or None.
    step: how many batches the running statistics have seen, int64; None where nobody counts.
    layer: the layer's name.
    """

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: Activation
    residual: Tensor | None
    mask: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    step: Tensor | None
    layer: Callable[[], Name]

    def normalised(
        self, training: bool = True, group: int = 0, exchange: Exchange | None = None
    ) -> tuple[Tensor, Moments | None]:
        """The output, and the moments it was normalised by; None where those are the running statistics."""
        call = Call(
            training,
            self.eps,
            self.activation,
            self.running_mean,
            self.running_var,
            mask=self.mask,
            group=group,
            exchange=exchange,
        )
        output = functional.normalise(self.input, self.weight, self.bias, self.residual, call)
        return output, call.batch_moments()


class Statistics:
    """By whose moments a layer normalises a training batch; a layer without any takes the batch's own.

    One object may serve many layers: it holds settings, never a batch or a buffer.
    """

    def __call__(self, batch: Batch) -> tuple[Tensor, Moments | None]:
        """The output, and the moments, (C,), that the running statistics follow; None if they stay as they are."""
        raise NotImplementedError
