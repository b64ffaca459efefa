"""The problems of the grid: one entry is one case, for every implementation, dtype and mode."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


def _in_larger(x: Tensor) -> Tensor:
    """`x` as the middle of a tensor that is larger in every dimension, as concat and narrow hand it over."""
    larger = torch.full([size + 2 for size in x.shape], torch.nan, dtype=x.dtype)
    middle = larger[tuple(slice(1, -1) for _ in x.shape)]
    return middle.copy_(x)


# The same values at other places in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),  # of any rank
    "slice": _in_larger,
    "samples_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),  # not aligned
}


@dataclass(frozen=True)
class Problem:
    """What is to be normalised: the input is `mean` + `std`·noise, with running statistics near those."""

    name: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    mean: float = 0.3
    std: float = 1.0
    weight: bool = True
    bias: bool = True
    eps: float = 1e-5
    momentum: float = 0.1
    activation: str | None = None
    residual: bool = False

    def tensors(self, dtype: torch.dtype) -> "Tensors":
        channels = self.shape[1]

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64)

        def parameter(x: Tensor) -> torch.nn.Parameter:
            return torch.nn.Parameter(x.to(dtype))

        layout = LAYOUTS[self.layout]
        # A residual of about ±8: no rounding of a half type may carry a sum across the kink of a ReLU, where
        # gradients jump.
        residual = (8 + noise(*self.shape)) * noise(*self.shape).sign()
        wide = dtype if dtype == torch.float64 else torch.float32
        return Tensors(
            input=layout((self.mean + self.std * noise(*self.shape)).to(dtype)).requires_grad_(),
            weight=parameter(1 + 0.5 * noise(channels)) if self.weight else None,
            bias=parameter(noise(channels)) if self.bias else None,
            residual=layout(residual.to(dtype)).requires_grad_() if self.residual else None,
            running_mean=(self.mean + self.std * noise(channels)).to(wide),
            running_var=(self.std**2 * (0.5 + torch.rand(channels, dtype=torch.float64))).to(wide),
            output_gradient=LAYOUTS[self.gradient_layout](noise(*self.shape).to(dtype)),
        )


@dataclass(frozen=True)
class Tensors:
    """A problem's tensors, in one dtype; the running statistics in float32 or wider."""

    input: Tensor
    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None
    residual: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    output_gradient: Tensor

    def double(self) -> "Tensors":
        """Copies of the same values in float64, from which the oracle starts."""

        def copied(x: Any) -> Any:
            return x.detach().double().clone().requires_grad_(x.requires_grad)

        return replace(self, **{name: copied(x) for name, x in vars(self).items() if x is not None})

    def differentiable(self) -> dict[str, Tensor]:
        named = {"input": self.input, "weight": self.weight, "bias": self.bias, "residual": self.residual}
        return {name: x for name, x in named.items() if x is not None}


PROBLEMS = [
    # ranks
    Problem("(N, C)", (60, 5)),
    Problem("(N, C, L)", (6, 3, 7)),
    Problem("(N, C, H, W)", (8, 3, 6, 5)),
    Problem("(N, C, D, H, W)", (3, 2, 3, 4, 2)),
    # sizes
    Problem("two samples", (2, 4)),
    Problem("one sample", (1, 3, 4, 5)),
    Problem("one position", (9, 3, 1, 1)),
    Problem("one channel", (4, 1, 3, 3)),
    Problem("many channels", (4, 130, 2, 2)),
    Problem("tails", (3, 3, 7, 7)),
    # arguments
    Problem("no weight", (8, 3, 5, 5), weight=False),
    Problem("no bias", (8, 3, 5, 5), bias=False),
    Problem("neither", (8, 3, 5, 5), weight=False, bias=False),
    Problem("large eps", (8, 3, 5, 5), eps=0.5),
    Problem("large momentum", (8, 3, 5, 5), momentum=0.9),
    Problem("momentum one", (8, 3, 5, 5), momentum=1.0),
    *(Problem(name, (8, 3, 5, 5), activation=name)
      for name in ("relu", "leaky_relu", "relu6", "silu", "sigmoid", "tanh")),
    Problem("residual", (8, 3, 5, 5), residual=True),
    Problem("residual, relu", (8, 3, 5, 5), residual=True, activation="relu"),
    Problem("residual, silu", (8, 3, 5, 5), residual=True, activation="silu"),
    # layouts
    Problem("channels_last", (8, 3, 6, 5), "channels_last"),
    Problem("channels_last (N, C, L)", (6, 3, 7), "channels_last"),
    Problem("channels_last_3d", (3, 2, 3, 4, 2), "channels_last"),
    Problem("channels_last, relu", (8, 3, 5, 5), "channels_last", "channels_last", activation="relu"),
    Problem("channels_last, residual", (8, 3, 5, 5), "channels_last", "channels_last", residual=True),
    Problem("slice", (4, 3, 5, 4), "slice"),
    Problem("slice (N, C)", (20, 3), "slice"),
    Problem("transposed", (4, 3, 5, 4), "transposed"),
    Problem("transposed (N, C)", (20, 3), "transposed"),
    Problem("samples_last", (4, 3, 5, 4), "samples_last"),
    Problem("offset", (4, 3, 5, 4), "offset"),
    Problem("gradient in a slice", (4, 3, 5, 4), gradient_layout="slice"),
    Problem("gradient channels_last", (4, 3, 5, 4), gradient_layout="channels_last"),
    Problem("only the gradient contiguous", (4, 3, 5, 4), "channels_last"),
    # numbers
    *(Problem(f"mean {mean:g}, {layout}", (8, 3, 6, 5), layout, mean=mean)
      for mean in (-1e3, 1e4) for layout in ("contiguous", "channels_last")),
    *(Problem(f"mean {mean:g} (N, C)", (60, 5), mean=mean) for mean in (1e3, 1e4)),
    Problem("small", (8, 3, 5, 5), mean=1e-3, std=1e-2),
    Problem("large", (8, 3, 5, 5), mean=1e3, std=1e3),
]  # fmt: skip
