"""Two thousand calls that nobody would write, against the formula in float64; `make fuzz` goes on for hours.

The number of calls is FUZZ_CALLS. A failure is shown as the smallest call that fails.
"""

import os
import warnings

import hypothesis
import pytest
import torch

import batchnorm as bn
from tests.fuzz.calls import UNITS, Call, OneValue, calls, formula, layer_of, tensors

CALLS = int(os.environ.get("FUZZ_CALLS", "1000"))
LONG = CALLS > 2000


@pytest.mark.slow
@hypothesis.settings(max_examples=CALLS, derandomize=not LONG)
@hypothesis.given(calls())
def test_a_call_gives_what_the_formula_says(call):
    before = torch.get_num_threads()
    torch.set_num_threads(call.threads)
    try:
        with bn.kernels.use(call.kernels), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of batches that are skipped
            check(call)
    finally:
        torch.set_num_threads(before)


def check(call: Call) -> None:
    given = tensors(call)
    if given.x.dim() < 2:
        with pytest.raises((ValueError, RuntimeError), match="dim"):
            bn.BatchNorm(3)(given.x)
        return
    layer = layer_of(call, given.x.shape)
    buffers = {name: values.clone() for name, values in layer.named_buffers()}
    training = call.training
    try:
        expected = formula(call, layer, given, training)
    except OneValue:
        if call.on_single == "raise":
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                layer(given.x, residual=given.residual, mask=given.mask)
            unchanged(layer, buffers)
            return
        training = False
        expected = formula(call, layer, given, training)
    x = given.x.detach().requires_grad_()
    y = layer(x, residual=given.residual, mask=given.mask)
    (dx,) = torch.autograd.grad(y, x, given.dy)
    assert (y.shape, y.dtype, dx.shape, dx.dtype) == (x.shape, x.dtype, x.shape, x.dtype)
    unit = max(UNITS[call.dtype], 2.0**-24 if call.dtype != torch.float64 else 0)
    if call.dtype == torch.float64:
        unit *= 2  # the formula rounds as well: of 1,300 values by 4 units at most, the kernels by 5.3
    if call.kernels == "torch":
        unit = max(unit, 1e-4 if call.dtype != torch.float64 else 1e-11)  # torch's own accuracy
    largest_x = max([1.0, *given.x.double().abs().nan_to_num(0, 0, 0).flatten().tolist()])
    # where there is no spread, rounding is all there is
    rounding = 2.0**-53
    if call.kernels == "torch":  # whose sums are naive: n values may be off by n units
        of_sum = given.x.numel() / max(1, given.x.size(1)) / 4
        rounding = max(1, of_sum) * 2.0**-24 if call.dtype != torch.float64 else max(64, of_sum) * 2.0**-53
    of_mean = 4 * rounding * largest_x * expected.steepness
    near(y, expected.y, expected.same_y, 8 * unit * expected.largest + of_mean, "y")
    largest_dy = max([1.0, *given.dy.double().abs().flatten().tolist()])
    of_gradients = expected.steepness * largest_dy
    summed = of_gradients * expected.largest
    if call.kernels == "torch":  # keeps Σ dy·(x - mean) in x's dtype where the channels are last
        summed = max(summed, largest_x * largest_dy)
    if summed < torch.finfo(call.dtype).max / 16:  # else what is summed may overflow
        near(dx, expected.dx, expected.same_dx, 16 * (unit * expected.largest + of_mean) * of_gradients, "dx")
    assert not y[~given.positions()].any()
    skipped = not training or call.statistics == "Population" or not expected.same_y.all() or not y.numel()
    if skipped or not given.positions().any():
        unchanged(layer, buffers)
    else:
        assert layer.num_batches_tracked == 1
        assert all(values.isfinite().all() for values in layer.buffers())


def near(
    found: torch.Tensor, expected: torch.Tensor, where: torch.Tensor, tolerance: float, what: str
) -> None:
    where = where & (expected.abs() + tolerance < torch.finfo(found.dtype).max)  # beyond it is inf, rightly
    if where.any():
        error = (found.detach().double() - expected)[where].abs().max().item()
        assert error <= tolerance, f"{what} is off by {error:.2e}, more than {tolerance:.2e}"


def unchanged(layer: bn.BatchNorm, buffers: dict[str, torch.Tensor]) -> None:
    for name, values in layer.named_buffers():
        assert torch.equal(values, buffers[name]), name
