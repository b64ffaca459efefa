"""The fully connected network of the paper's first experiment, with and without batch normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from batchnorm.layers import BatchNorm1d

Nonlinearity = Literal["sigmoid", "relu"]
_NONLINEARITIES: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}


class MLP(nn.Module):
    """Fully connected layers z = g(Wu + b) and a linear output (Ioffe & Szegedy 2015, sec. 4.1).

    With batch normalization z = g(BN(Wu)): BN is applied immediately before the nonlinearity, and the bias
    is dropped, as β replaces it (sec. 3.2). Networks with and without BN have the same initial weights when
    `generator` has the same seed.

    Args:
        inputs: number of input values.
        hidden: widths of the hidden layers.
        classes: number of outputs, logits.
        batch_norm: whether every hidden layer has BN.
        nonlinearity: "sigmoid" or "relu".
        init_std: standard deviation of the hidden layers' Gaussian initial weights; biases start at 0.
        output_std: the same for the output layer.
        dropout: probability of zeroing a hidden activation in training.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int] = (100, 100, 100),
        classes: int = 10,
        *,
        batch_norm: bool,
        nonlinearity: Nonlinearity = "sigmoid",
        init_std: float = 0.1,
        output_std: float = 0.1,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers.append(_linear(inputs, width, not batch_norm, init_std, generator))
            if batch_norm:
                layers.append(BatchNorm1d(width))
            layers.append(_NONLINEARITIES[nonlinearity]())
            if dropout:
                layers.append(nn.Dropout(dropout))
            inputs = width
        layers.append(_linear(inputs, classes, True, output_std, generator))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of `x`, (N, ...) with `inputs` values a sample."""
        output: Tensor = self.layers(x)
        return output

    @property
    def last_nonlinearity(self) -> nn.Module:
        """The nonlinearity of the last hidden layer, whose input is shown in figure 1(b, c)."""
        return [m for m in self.layers if isinstance(m, tuple(_NONLINEARITIES.values()))][-1]


def _linear(
    inputs: int, outputs: int, bias: bool, std: float, generator: torch.Generator | None
) -> nn.Linear:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=std, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
