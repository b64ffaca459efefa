"""The compiled module: its stub, and the accuracy of each instruction set that this machine can run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dense_tensors_give_the_same_bits_where_torch_has_no_exchange_api(monkeypatch, dtype):
    from batchnorm.kernels import native

    assert native._READS_TENSORS
    for problem in PROBLEMS:
        outcomes = []
        for reads in (True, False):
            monkeypatch.setattr(native, "_READS_TENSORS", reads)
            torch.manual_seed(0)
            with choice.use("native"):
                outcomes.append(IMPLEMENTATIONS["layer"].run(problem, problem.tensors(dtype), True))
        dense, by_address = outcomes
        for name, value in dense.items():
            assert_close(
                value, by_address[name], rtol=0, atol=0, equal_nan=True, msg=f"{problem.name}: {name}"
            )


@pytest.mark.parametrize("spoil", ["running_mean", "batches", "stats", "weight", "y", "x"])
def test_what_is_not_dense_is_left_alone(spoil):
    from batchnorm.kernels import _native

    tensors = {
        "x": torch.randn(4, 3, 5), "y": torch.full((4, 3, 5), 7.0), "weight": torch.ones(3), "bias": torch.zeros(3),
        "stats": torch.full((2, 3), 7.0).double(), "running_mean": torch.zeros(3), "running_var": torch.ones(3),
        "batches": torch.tensor(0),
    }  # fmt: skip
    spoilt = {
        "running_mean": torch.zeros(6)[::2], "batches": torch.tensor(0, dtype=torch.int32),
        "stats": torch.full((2, 3), 7.0), "weight": torch.ones(4), "y": torch.full((4, 5, 3), 7.0).mT,
        "x": torch.randn(4, 3, 5, device="meta"),
    }  # fmt: skip
    tensors[spoil] = spoilt[spoil]
    arguments: list[Any] = [*tensors.values(), 0.1, 1e-5, 0, 0.0, 1]
    assert _native.forward_dense(*arguments) is None
    for name, expected in (("y", 7), ("stats", 7), ("running_mean", 0), ("running_var", 1), ("batches", 0)):
        assert bool((tensors[name] == expected).all())


def test_an_unknown_exchange_table_is_refused():
    import ctypes

    from batchnorm.kernels import _native

    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    table = (ctypes.c_uint32 * 32)(2, 0)
    assert not _native.use_exchange(new(ctypes.addressof(table), b"dlpack_exchange_api", None))
    x, stats = torch.ones(2, 2), torch.ones(2, 2).double()
    assert _native.forward_dense(x, x, None, None, stats, None, None, None, 0, 1, 0, 0, 1) is not None


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
