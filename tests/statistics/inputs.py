"""Inputs, and what a call makes of them: for the tests of this folder."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm.kernels import choice
from tests.grid.problems import LAYOUTS

KERNELS: tuple[choice.Name, ...] = choice.NAMES if choice.built() else ("torch", "reference")
each_kernels = pytest.mark.parametrize("kernels", KERNELS)
native_only = pytest.mark.skipif(not choice.built(), reason="installed without native kernels")

# Relative to the largest of a tensor, or 1.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-5}


def random(*shape: int, layout: str = "contiguous", dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal values, 0.5 added, at places in memory as `layout` says."""
    return LAYOUTS[layout]((torch.randn(shape, dtype=torch.float64) + 0.5).to(dtype))


def asking(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Any]:
    """Leaves of the same values and strides that ask for gradients."""
    return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def outcome(call: Callable[..., Any], given: Sequence[Any], dy: Tensor) -> list[Any]:
    """The output, and the gradients of what is `given`."""
    y = call(*given)
    return [y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))]


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b.double()).abs().max()
        assert error <= TOLERANCE[dtype] * max(1, float(b.abs().max())), (i, error)  # a nan is not
