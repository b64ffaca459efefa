"""The tests of triton_grid in Triton's interpreter, and on a GPU where there is one; what the kernels compile to."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.kernels import choice
from tests.kernels.processes import said

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not choice.built(), reason="installed without native kernels"),
]


def run_grid(env: Mapping[str, str]) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/kernels/triton_grid.py"],
        cwd=Path(__file__).parents[2],
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed is not None and int(passed[1]) >= 200, ended.stdout


@pytest.mark.slow
def test_in_the_interpreter():
    run_grid({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    run_grid({"TRITON_INTERPRET": "0"})


# --- compiled, which needs no GPU

LAYOUTS = {"planes": (False, 1, 2048, 4), "rows": (True, 64, 64, 8)}
REGISTERS = {  # at most, of a thread
    "planes": {"moments_of_parts": 80, "normalise": 64, "sums_of_parts": 96, "gradients": 80},
    "rows": {"moments_of_parts": 128, "normalise": 96, "sums_of_parts": 128, "gradients": 128},
}


def launches(dtype: torch.dtype, layout: str) -> Iterator[tuple[str, dict[str, str], dict[str, Any], int]]:
    """Name, types and constants of each kernel, and its number of warps."""
    from batchnorm.kernels import triton_kernels

    rows, lines, columns, warps = LAYOUTS[layout]
    wide = triton_kernels.WIDE[dtype]
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    tile: dict[str, Any] = {"STEP": 16, "ROWS": rows, "LINES": lines, "COLUMNS": columns, "WIDE": wide}
    fused = {"KNOWN": False, "ACTIVATION": 1, "SLOPE": 0.0, **tile}
    merged: dict[str, Any] = {"PARTS": 128, "COLUMNS": 8}
    types = {
        **dict.fromkeys(("x", "y", "dy", "dx", "residual", "dresidual"), element),
        **dict.fromkeys(("weight", "bias", "dweight", "dbias", "running_mean", "running_var"), "*fp32"),
        **dict.fromkeys(("found", "stats", "sums", "mean", "spread", "averages"), "*fp64"),
        **{"entered": "*i8", "batches": "*i64", "skipped": "*i64", "eps": "fp64", "rate_value": "fp64"},
    }
    yield "moments_of_parts", types, tile, warps
    yield "merge_moments", types, merged, 4
    yield "normalise", types, {"rate": None, **fused}, warps
    yield "sums_of_parts", types, {"dx": None, "dresidual": None, **fused}, warps
    yield "merge_sums", types, {"KNOWN": False, "WIDE": wide, **merged}, 4
    yield "gradients", types, {"SUMS": True, **fused}, warps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_kernels_spill_nothing_and_read_16_bytes_at_once(capability, dtype, layout):
    import triton  # type: ignore[import-untyped]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-untyped]

    from batchnorm.kernels import triton_kernels

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    for name, types, constants, warps in launches(dtype, layout):
        kernel = getattr(triton_kernels, name)
        places = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
        signature = {
            argument: "constexpr" if argument in constants else types.get(argument, "i32")
            for argument in places
        }
        aligned = [["tt.divisibility", 16]]
        source = ASTSource(
            kernel, signature, {places[name]: value for name, value in constants.items()},
            {places[name]: aligned for name, kind in signature.items() if kind.startswith("*")},
        )  # fmt: skip
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(tools / "cuobjdump"), "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (used,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        registers, stack, local = map(int, used)
        print(capability, dtype, layout, name, registers)
        assert stack == local == 0, f"{name} spills"
        if name in REGISTERS[layout]:
            assert registers <= REGISTERS[layout][name], f"{name} takes {registers} registers"
            assert "ld.global.v4.b32" in compiled.asm["ptx"], name


# As a GPU would be asked: all arguments go through Triton's own binder, and what is launched is compiled instead.
BOUND = """
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

class Absent(DriverBase):
    is_active = get_active_torch_device = map_python_to_cpp_type = get_benchmarker = lambda *_: None
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)

    def __init__(self):
        pass

driver.set_active(Absent())
from batchnorm.kernels import triton_launches
from batchnorm.kernels.call import Call

bound = []

def start(kernel, grid, device, arguments, constants):
    types = kernel.warmup(*arguments, grid=grid, **constants).src.signature
    assert types.get("eps", "fp64") == types.get("rate_value", "fp64") == "fp64", types
    bound.append(kernel.__name__)

triton_launches._start = start
for shape, group, rate in (
    ((4, 16, 8, 8), 0, 0.1), ((8, 24), 0, torch.tensor(0.1, dtype=torch.float64)), ((8, 3, 5, 5), 2, 0.1)
):
    x, channels = torch.empty(shape, dtype=torch.bfloat16), torch.ones(shape[1])
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    call = Call(True, 1e-5, None, channels, channels.clone(), rate, counts[0], group=group)
    call.skipped, call.updates_inline, call.fused = counts[1], not group, (1, 0.0)
    weight, bias = (None, channels) if group else (channels, None)
    y = triton_launches.forward(x, weight, bias, x, call)
    triton_launches.backward(x, x, y, weight, bias, call)
print(len(bound))
"""


@pytest.mark.slow
def test_arguments_are_those_that_a_launch_takes():
    assert said(BOUND) == "18"
