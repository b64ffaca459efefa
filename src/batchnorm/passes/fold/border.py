"""A convolution that pads, behind a folded layer: what the layer's term brings depends on the distance to the border.

    W·pad(s·x + t) is (W·s)·pad(x) + W·pad(t),  and W·pad(t) is a map of each output channel: its taps over the image

where a tap is the sum of the weights at it, times the terms. The map is made once for each size of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Bordered(nn.Module):
    """A convolution to whose output the map of `taps`, (outputs, 1, *kernel), is added."""

    taps: Tensor
    _map: tuple[Any, Tensor] | None

    def forward(self, input: Tensor) -> Tensor:
        module: Any = self
        y: Tensor = module._conv_forward(input, module.weight, module.bias)
        sizes = input.shape[2 - len(self.taps.shape) :]
        how = module.stride, module.padding, module.dilation
        if torch.compiler.is_compiling():
            return y + map_of(self.taps, sizes, *how)
        version = 0 if self.taps.is_inference() else self.taps._version
        key = sizes, self.taps.dtype, self.taps.device, self.taps.data_ptr(), version
        if self._map is None or self._map[0] != key:
            self._map = key, map_of(self.taps, sizes, *how)
        return y + self._map[1]


class BorderedConv1d(_Bordered, nn.Conv1d):
    """`torch.nn.Conv1d`, with a map added."""


class BorderedConv2d(_Bordered, nn.Conv2d):
    """`torch.nn.Conv2d`, with a map added."""


class BorderedConv3d(_Bordered, nn.Conv3d):
    """`torch.nn.Conv3d`, with a map added."""


BORDERED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: BorderedConv1d,
    nn.Conv2d: BorderedConv2d,
    nn.Conv3d: BorderedConv3d,
}


def map_of(taps: Tensor, sizes: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """(1, outputs, *sizes of the output): the taps that are over the image at each position, added."""
    image = torch.ones(1, 1, *sizes, dtype=taps.dtype, device=taps.device)
    return _CONVOLUTIONS[len(sizes)](image, taps, None, stride, padding, dilation)


def make_bordered(module: nn.Module, taps: Tensor) -> None:
    """Turn a convolution of torch's into its bordered one, in place."""
    weight: Any = module.weight
    module.__class__ = BORDERED[type(module)]
    module.register_buffer("taps", taps.to(weight))
    vars(module)["_map"] = None
