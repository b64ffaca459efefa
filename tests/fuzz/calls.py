"""Calls of a layer that nobody would write, and what the formula in float64 says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import batchnorm as bn

SIZES = [0, 1, 2, 3, 5, 7, 8, 13, 16, 17, 31]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels last", "permuted", "sliced", "expanded", "overlapping"]
VALUES = ["normal", "few", "far", "large", "tiny", "constant", "inf", "nan"]
STATISTICS = ["batch", "Ghost", "Renorm", "Population"]
ACTIVATIONS = [None, "relu", "leaky_relu", "relu6", "silu", "tanh"]


@dataclass(frozen=True)
class Call:
    """All that a call depends on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    values: str
    mask: str  # "", "positions" or "lengths"
    statistics: str
    group: int
    per_activation: bool
    activation: str | None
    residual: bool
    affine: bool
    training: bool
    on_single: str
    eps: float
    kernels: str
    threads: int
    seed: int


def calls() -> st.SearchStrategy[Call]:
    sizes = st.sampled_from(SIZES)
    return st.builds(
        Call,
        shape=st.lists(sizes, min_size=1, max_size=6).map(_bounded),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        values=st.sampled_from(VALUES),
        mask=st.sampled_from(["", "", "positions", "lengths"]),
        statistics=st.sampled_from(STATISTICS),
        group=st.sampled_from([1, 2, 3, 5, 64]),
        per_activation=st.integers(0, 4).map(lambda number: number == 0),
        activation=st.sampled_from(ACTIVATIONS),
        residual=st.booleans(),
        affine=st.booleans(),
        training=st.integers(0, 4).map(lambda number: number > 0),
        on_single=st.sampled_from(["raise", "running"]),
        eps=st.sampled_from([1e-5, 1e-3, 1e-12]),
        kernels=st.sampled_from(["native", "native", "reference", "torch"]),
        threads=st.sampled_from([1, 2, 3]),
        seed=st.integers(0, 2**31),
    )


def _bounded(sizes: list[int]) -> tuple[int, ...]:
    """Sizes whose product stays below 50,000: the last ones become 2."""
    while math.prod(max(size, 1) for size in sizes) > 50_000:
        place = max(range(len(sizes)), key=lambda each: sizes[each])
        sizes = [*sizes[:place], 2, *sizes[place + 1 :]]
    return tuple(sizes)


@dataclass(frozen=True)
class Tensors:
    """The tensors of a call."""

    x: Tensor
    residual: Tensor | None
    mask: Tensor | None
    dy: Tensor

    def positions(self) -> Tensor:
        """Where the mask, of whichever kind, counts."""
        mask = self.mask
        if mask is None:
            return torch.ones(self.x.shape, dtype=torch.bool)
        if mask.dtype != torch.bool:
            mask = (torch.arange(self.x.size(2)) < mask[:, None])[:, None]
        return mask.expand(self.x.shape)


def tensors(call: Call) -> Tensors:
    generator = torch.Generator().manual_seed(call.seed)

    def normal() -> Tensor:
        return torch.randn(call.shape, generator=generator, dtype=torch.float64)

    x = normal()
    match call.values:
        case "few":
            x = (x * 4).round().relu()
        case "far":
            x = x + 100
        case "large":
            x = x * 1e3
        case "tiny":
            x = x * 1e-4
        case "constant":
            x = torch.full_like(x, 0.7)
        case "inf" | "nan" if x.numel():
            x.view(-1)[call.seed % x.numel()] = float(call.values)
    x = laid_out(x.to(call.dtype), call.layout)
    shape = x.shape
    mask = None
    if call.mask == "lengths" and x.dim() == 3:
        mask = torch.randint(0, shape[2] + 1, shape[:1], generator=generator)
    elif call.mask and x.dim() >= 2:
        mask = torch.rand(shape[0], 1, *shape[2:], generator=generator) < (call.seed % 4) / 3
    residual = laid_out(normal().to(call.dtype), call.layout) if call.residual else None
    return Tensors(x, residual, mask, normal().to(call.dtype).reshape(shape))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, or some of them, in memory that is not contiguous."""
    if layout == "channels last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "permuted":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.cat([x, x], -1)[..., ::2] if x.dim() else x
    if layout == "expanded" and x.size(0):
        return x[:1].expand(x.shape)
    if layout == "overlapping" and x.dim() == 3 and x.size(2) > 1 and x.is_contiguous() and x.numel():
        return x.as_strided(x.shape, (x.stride(0), max(1, x.stride(1) - 1), 1))
    return x


def layer_of(call: Call, shape: torch.Size) -> bn.BatchNorm:
    """The layer, whose running statistics and parameters are none of a new one."""
    per_activation = call.per_activation and len(shape) > 2 and 0 not in shape[1:]
    features: int | tuple[int, ...] = tuple(shape[1:]) if per_activation else shape[1]
    statistics = {
        "batch": None,
        "Ghost": bn.Ghost(call.group),
        "Renorm": bn.Renorm(2.0, 1.0),
        "Population": bn.Population(),
    }[call.statistics]
    layer = bn.BatchNorm(
        features,
        eps=call.eps,
        affine=call.affine,
        activation=call.activation,
        statistics=statistics,
        on_single=call.on_single,  # type: ignore[arg-type]
    ).train(call.training)
    generator = torch.Generator().manual_seed(call.seed + 1)
    with torch.no_grad():
        for values in [*layer.parameters(), layer.running_mean]:
            assert values is not None
            values.copy_(torch.randn(values.shape, generator=generator))
        assert layer.running_var is not None
        layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=generator) + 0.5)
    return layer


@dataclass(frozen=True)
class Expected:
    """What docs/numerics.md says, in float64.

    y, dx: output and gradient.
    same_y, same_dx: where they can be compared: not in channels with inf or nan, and gradients not in channels where
        rounding decides on which side of an activation's kink a value is.
    largest: of what comes to the activation.
    steepness: largest |weight| / σ.
    """

    y: Tensor
    dx: Tensor
    same_y: Tensor
    same_dx: Tensor
    largest: float
    steepness: float


class OneValue(Exception):
    """Some channel has a single value."""


def formula(call: Call, layer: bn.BatchNorm, given: Tensors, training: bool) -> Expected:
    """What the layer should give, or raise: OneValue."""
    shape, valid = given.x.shape, given.positions()
    x = torch.where(valid, given.x.detach().double(), 0).requires_grad_()
    per_activation = isinstance(layer.num_features, tuple)
    where = [0] if per_activation else [0, *range(2, x.dim())]
    view = (1, *shape[1:]) if per_activation else (1, shape[1], *[1] * (x.dim() - 2))

    def channels(values: Tensor | None, otherwise: float) -> Tensor:
        if values is None:
            return torch.full(view, otherwise, dtype=torch.float64)
        return values.detach().double().reshape(view)

    mean_run, variance_run = channels(layer.running_mean, 0), channels(layer.running_var, 1)
    sigma_run = (variance_run + call.eps).sqrt()
    weight, bias = channels(layer.weight, 1), channels(layer.bias, 0)
    groups = max(1, shape[0] // call.group) if call.statistics == "Ghost" else 1
    parts, steepness, largest = [], 0.0, 1.0
    for number in range(groups):  # the last one takes what is left over
        of_group = slice(number * call.group, None if number == groups - 1 else (number + 1) * call.group)
        part, some = x[of_group], valid[of_group]
        if not training or call.statistics == "Population":
            sigma, normalised = sigma_run, (part - mean_run) / sigma_run
        else:
            count = some.sum(where, keepdim=True).double()
            if (count == 1).any():
                raise OneValue
            known = count.clamp(min=1)
            mean = torch.where(some, part, 0).sum(where, keepdim=True) / known
            variance = torch.where(some, part - mean, 0).square().sum(where, keepdim=True) / known
            mean, variance = torch.where(count > 0, mean, 0), torch.where(count > 0, variance, 1)
            sigma = (variance + call.eps).sqrt()
            normalised = (part - mean) / sigma
            if call.statistics == "Renorm":
                r = (sigma / sigma_run).detach().clamp(1 / 2, 2)
                d = ((mean - mean_run) / sigma_run).detach().clamp(-1, 1)
                normalised = normalised * r + d
                # what rounding leaves of a mean, in units of σ, counts in units of σ_run here
                largest = max([largest, *(sigma / sigma_run).detach().nan_to_num(0).flatten().tolist()])
        parts.append(normalised)
        steepness = max([steepness, *(2 * weight.abs() / sigma).nan_to_num(0).flatten().tolist()])
    z = torch.cat(parts) * weight + bias
    if given.residual is not None:
        z = z + given.residual.double()
    y = torch.where(valid, z if call.activation is None else FUNCTIONS[call.activation](z), 0)
    (dx,) = torch.autograd.grad(y, x, given.dy.double())
    finite = (given.x.isfinite() | ~valid).double()
    largest = max([largest, *z.detach().abs().nan_to_num(0, 0, 0).flatten().tolist()])
    clear = torch.ones(shape, dtype=torch.float64)
    largest_x = max([1.0, *x.detach().abs().nan_to_num(0, 0, 0).flatten().tolist()])
    of_mean = largest_x * steepness * (2.0**-24 if call.kernels == "torch" else 2.0**-53)
    rounding = 64 * (UNITS[call.dtype] * largest + of_mean)
    for kink in KINKS.get(call.activation or "", ()):
        clear = clear * ((z.detach() - kink).abs() > rounding)
    if x.numel():
        finite = finite.amin(where, keepdim=True).expand(shape)
        clear = clear.amin(where, keepdim=True).expand(shape)
    return Expected(y.detach(), dx, finite > 0, finite * clear > 0, largest, steepness)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "tanh": torch.tanh,
}
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0)}
UNITS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
