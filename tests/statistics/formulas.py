"""A training step by formula, in plain torch of float64 whose gradients autograd finds, for every statistics.

On ranks each has a part of the batch, and the formulas the whole.
"""

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.statistics import Statistics

Kind = Statistics | None


# --- the batch, on one process or on ranks


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(whole: Any) -> Any:
    """The samples of this rank: of two, the first has two thirds."""
    if whole is None or ranks() == 1:
        return whole
    first = len(whole) - len(whole) // 3
    return whole.split([first, len(whole) - first])[dist.get_rank()].clone()


def summed(own: Any) -> Tensor:
    total: Tensor = own.detach().clone()
    if ranks() > 1:
        dist.all_reduce(total)
    return total


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.7 + 0.6


def valid(*shape: int) -> Tensor:
    """A mask; samples 4 to 7, a group of a Ghost(4), are padding alone."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) > 0.3
    mask[4:8] = False
    return mask


def near(found: Any, expected: Tensor) -> None:
    assert_close(found.detach().double(), expected.detach().double(), rtol=1e-8, atol=1e-9)


def near_all(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        near(a, b)


# --- the formulas


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.dim() - 2))


def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each channel: how many values are valid, their mean, and their biased variance."""
    dims = [0, *range(2, x.dim())]
    chosen = torch.ones_like(x) if mask is None else mask.expand_as(x).to(x.dtype)
    count = chosen.sum(dims)
    mean = (x * chosen).sum(dims) / count.clamp(min=1)
    variance = ((x - per_channel(mean, x)).square() * chosen).sum(dims) / count.clamp(min=1)
    return count, mean, variance


def normal(kind: Kind, x: Tensor, running: Any, mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x̂ of a training batch."""
    _, mean, variance = moments(x, mask)
    running_mean, running_var = running
    if isinstance(kind, bn.Ghost) and len(x) >= 2 * kind.size:
        last = len(x) // kind.size * kind.size - kind.size
        bounds = [*range(0, last + 1, kind.size), len(x)]
        cuts = [slice(*pair) for pair in itertools.pairwise(bounds)]
        return torch.cat([normal(None, x[s], running, None if mask is None else mask[s], eps) for s in cuts])
    if isinstance(kind, bn.Population):
        mean, variance = running_mean, running_var
    x_hat = (x - per_channel(mean, x)) / per_channel(variance + eps, x).sqrt()
    if isinstance(kind, bn.Renorm):
        sigma, sigma_run = (variance + eps).sqrt(), (running_var + eps).sqrt()
        r = (sigma / sigma_run).clamp(1 / kind.rmax, kind.rmax).detach()  # type: ignore[operator]
        d = ((mean - running_mean) / sigma_run).clamp(-kind.dmax, kind.dmax).detach()  # type: ignore[operator]
        return x_hat * per_channel(r, x) + per_channel(d, x)
    return x_hat


def affine(x_hat: Tensor, weight: Any, bias: Any) -> Tensor:
    return x_hat * per_channel(weight, x_hat) + per_channel(bias, x_hat)


def evaluated(layer: Any, x: Tensor) -> Tensor:
    return affine(
        normal(bn.Population(), x, (layer.running_mean, layer.running_var)), layer.weight, layer.bias
    )


def layer_of(kind: Kind, features: Any = 3, seed: int = 1, **options: Any) -> Any:
    """With parameters and running statistics that are not those of a new one."""
    layer = bn.BatchNorm(features, dtype=torch.float64, statistics=kind, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            if values is not None:
                values.copy_(torch.rand(values.shape, generator=generator, dtype=torch.float64) + 0.5)
    return layer


def called(layer: Any, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    y: Tensor = layer(x, residual, mask)
    return y


def check(
    layer: Any,
    shape: tuple[int, ...] = (13, 3, 5, 4),
    *,
    call: Any = called,
    mask: Tensor | None = None,
    activation: Any = None,
    residual: bool = False,
    its: Any = None,
    rate: float = 0.1,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A training step: y, all gradients, and the running statistics of `its`; returns what these were to follow."""
    kind, its = layer.statistics, layer if its is None else its
    x, dy, added = (data(*shape, seed=10 * seed + k) for k in range(3))
    before, steps = [its.running_mean.clone(), its.running_var.clone()], int(its.num_batches_tracked)
    whole = [x, layer.weight, layer.bias, *([added] if residual else [])]
    whole = [t.detach().clone().requires_grad_() for t in whole]
    flat = (lambda t: t.flatten(1)) if isinstance(layer.num_features, tuple) else lambda t: t
    full = None if mask is None else mask.expand(shape)
    rows, chosen = flat(whole[0]), None if full is None else flat(full)
    running = [t.flatten() for t in before]
    y = affine(normal(kind, rows, running, chosen), whole[1].flatten(), whole[2].flatten()).reshape(shape)
    y = (activation or (lambda t: t))(y + whole[3] if residual else y)
    y = y if full is None else torch.where(full, y, 0)
    expected = torch.autograd.grad(y, whole, dy)

    given = [x, added] if full is None else [torch.where(full, t, torch.nan) for t in (x, added)]
    own = [mine(t).requires_grad_() for t in given[: 1 + residual]]
    found = call(layer, own[0], own[1] if residual else None, mine(mask))
    near(found, mine(y))
    layer.zero_grad()
    found.backward(mine(dy))
    near_all([t.grad for t in own], map(mine, (expected[0], *expected[3:])))
    near_all([summed(layer.weight.grad), summed(layer.bias.grad)], expected[1:3])

    count, mean, variance = (t.detach().reshape(before[0].shape) for t in moments(rows, chosen))
    batch = before if isinstance(kind, bn.Population) else [mean, variance * count / (count - 1)]
    for a, old, new in zip((its.running_mean, its.running_var), before, batch, strict=True):
        near(a, (1 - rate) * old + rate * new)
    assert int(its.num_batches_tracked) == steps + (not isinstance(kind, bn.Population)), "batches counted"
    return batch[0], batch[1]
