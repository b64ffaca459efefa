"""Layers that learn their number of channels from their first input."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from batchnorm.kernels.call import Activation
from batchnorm.kernels.reference import activation_function
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm, check_options
from batchnorm.statistics import Statistics


# torch's way to wait for the first input, and the options of ours
class _Lazy(nn.modules.batchnorm._LazyNormBase):
    """A {name} whose `num_features` is that of its first input, whereupon it becomes one; as torch.nn.Lazy{name}.

    Args:
        eps: as of {name}, and so all others.
        momentum: as there.
        affine: as there.
        track_running_stats: as there.
        device: as there.
        dtype: as there.
        bias: as there.
        activation: as there.
        statistics: as there.
        debiased: as there.
        on_single: as there.

    Raises:
        ValueError: an unknown activation or `on_single`.
        TypeError: `statistics` is not one of those that {name} takes.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.Lazy{name}(activation="relu")
        >>> output = layer(torch.randn({shape}))
        >>> type(layer).__name__, layer.num_features, layer.activation
        ('{name}', 8, 'relu')
    """

    statistics: Statistics | None

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation = None,
        statistics: Statistics | None = None,
        debiased: bool = False,
        on_single: Literal["raise", "running"] = "raise",
    ) -> None:
        activation_function(activation)
        check_options(statistics, on_single)
        without_bias: dict[str, Any] = {} if bias else {"bias": False}
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype, **without_bias)
        self.activation = activation
        self.statistics = statistics
        self.debiased, self.on_single = debiased, on_single

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """As torch's, for the arguments of our forward."""
        statistics, self.statistics = self.statistics, None  # a frozen layer would keep what memory holds
        super().initialize_parameters(input)
        self.statistics = statistics
        cast(_BatchNorm, self)._begin_tracking()


class LazyBatchNorm1d(_Lazy, BatchNorm1d):
    __doc__ = (_Lazy.__doc__ or "").format(name="BatchNorm1d", shape="16, 8")
    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, BatchNorm2d):
    __doc__ = (_Lazy.__doc__ or "").format(name="BatchNorm2d", shape="16, 8, 7, 7")
    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, BatchNorm3d):
    __doc__ = (_Lazy.__doc__ or "").format(name="BatchNorm3d", shape="16, 8, 4, 7, 7")
    cls_to_become = BatchNorm3d
