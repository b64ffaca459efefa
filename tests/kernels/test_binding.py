"""The compiled module: its stub, and the accuracy of each instruction set that this machine can run."""

import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.kernels import choice
from tests.grid.implementations import IMPLEMENTATIONS, ORACLE
from tests.grid.problems import PROBLEMS
from tests.grid.test_grid import TOLERANCE, tolerance

pytestmark = pytest.mark.skipif(not choice.built(), reason="installed without native kernels")

INSTRUCTION_SETS = ["avx512", "avx2", "baseline"]
CHOSEN = {"(N, C)", "many channels", "tails", "neither", "residual, relu", "relu6", "leaky_relu", "slice", "offset",
          "channels_last", "channels_last, relu", "channels_last, residual", "mean 10000, contiguous",
          "mean 10000, channels_last"}  # fmt: skip


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    from batchnorm.kernels import _native

    best = _native.instruction_set()
    try:
        _native.use_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"this machine cannot run {request.param}")
    yield request.param
    _native.use_instruction_set(best)


def test_the_problems_chosen_exist():
    assert {problem.name for problem in PROBLEMS} >= CHOSEN


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_instruction_set_agrees_with_float64(instruction_set, dtype, training):
    from batchnorm.kernels import _native

    assert _native.instruction_set() == instruction_set
    for problem in PROBLEMS:
        if problem.name not in CHOSEN:
            continue
        tensors = problem.tensors(dtype)
        expected = ORACLE.run(problem, tensors.double(), training)
        with choice.use("native"):
            found = IMPLEMENTATIONS["function"].run(problem, tensors, training)
        for name, value in found.items():
            scale = max(1.0, expected[name].abs().max().item())
            error = (value.double() - expected[name]).abs().max().item() / scale
            assert error <= tolerance(name, dtype), f"{problem.name}: {name} is off by {error:.1e}"


def test_an_unknown_instruction_set_is_an_error_and_changes_nothing():
    from batchnorm.kernels import _native

    best = _native.instruction_set()
    with pytest.raises(ValueError, match="instruction set"):
        _native.use_instruction_set("sse")
    assert _native.instruction_set() == best


@pytest.mark.slow
def test_the_stub_is_what_the_module_says(tmp_path):
    pytest.importorskip("nanobind")
    stub = Path(choice.__file__).with_name("_native.pyi")
    written = tmp_path / "_native.pyi"
    command = [
        sys.executable,
        "-m",
        "nanobind.stubgen",
        "-q",
        "-m",
        "batchnorm.kernels._native",
        "-o",
        str(written),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert written.read_text() == stub.read_text()
