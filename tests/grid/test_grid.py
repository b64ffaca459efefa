"""Every implementation on every problem in every dtype, against torch in float64 on the same values."""

from dataclasses import replace

import pytest
import torch

from tests.grid.implementations import IMPLEMENTATIONS, ORACLE
from tests.grid.problems import LAYOUTS, PROBLEMS

# How far a value may be from float64, relative to the largest of its tensor or to 1, whichever is larger.
# An output in a half type is rounded two or three times (normalised, sum, activation), each by up to half a unit in
# the last place, 2⁻⁹ in bfloat16 and 2⁻¹² in float16; the gradient of an input also starts from such rounded values.
# Those of weight and bias sum some 200 of them, whose roundings walk at random to √200 times one. In float64 a mean
# of 1e4, torch's as well as ours, is itself only known to 2e-12. Running statistics never leave float32.
TOLERANCE = {
    torch.float64: {"output": 1e-11, "gradient": 1e-11, "sums": 1e-11, "running": 1e-14},
    torch.float32: {"output": 5e-6, "gradient": 5e-6, "sums": 5e-6, "running": 3e-7},
    torch.bfloat16: {"output": 2**-7, "gradient": 2**-6, "sums": 2**-5, "running": 3e-7},
    torch.float16: {"output": 2**-10, "gradient": 2**-9, "sums": 2**-8, "running": 3e-7},
}


def tolerance(name, dtype):
    sums = name in ("gradient of weight", "gradient of bias")
    return TOLERANCE[dtype]["sums" if sums else name.replace("_", " ").split()[0]]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_agrees_with_float64(problem, implementation, dtype, training):
    tensors = problem.tensors(dtype)
    expected = ORACLE.run(problem, tensors.double(), training)
    found = IMPLEMENTATIONS[implementation].run(problem, tensors, training)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = max(1.0, expected[name].abs().max().item())
        error = (value.double() - expected[name]).abs().max().item() / scale
        assert error <= tolerance(name, dtype), f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_lies_in_memory_as_the_input(layout, dtype, training):
    (problem,) = (p for p in PROBLEMS if p.name == "(N, C, H, W)")
    tensors = problem.tensors(dtype)
    x, dy = (LAYOUTS[layout](t.detach()) for t in (tensors.input, tensors.output_gradient))
    tensors = replace(tensors, input=x.requires_grad_(), output_gradient=dy)
    found = IMPLEMENTATIONS["function"].run(problem, tensors, training)
    for name in ("output", "gradient of input"):
        assert found[name].stride() == torch.empty_like(x).stride(), name
        assert found[name].dtype == dtype
    assert not x.is_contiguous() or layout in ("contiguous", "offset")  # the layouts are what they say
