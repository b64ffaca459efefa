"""Folded networks against torch's, torch.fx's fuse, and ONNX Runtime of what ours and torch's exporter write.

All are given channels-last memory, which is the fastest for most of torch's convolutions on a CPU.
"""

from __future__ import annotations

import importlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench import networks
from batchnorm.bench.case import FORMATS, Case, Comparison, compile_static, time_calls
from batchnorm.bench.options import Options
from batchnorm.bench.rounds import Sample
from batchnorm.passes.export import write_onnx
from batchnorm.passes.fold import fold

_ONNX = ("onnx", "onnxscript", "onnxruntime")
_PAUSE = 0.03  # seconds


def cases(options: Options) -> list[Case]:
    """Each network, with each size of a batch."""
    return [
        Case(
            name,
            (batch, 3, options.size, options.size),
            "channels-last",
            "float32",
            ("evaluation",),
            partial(_network, name, batch, options),
        )
        for batch in options.batches
        for name in options.networks
        if not name.startswith("timm/") or find_spec("timm")
    ]


@contextmanager
def _network(name: str, batch: int, options: Options) -> Iterator[Comparison]:
    x = torch.randn(batch, 3, options.size, options.size)
    model = networks.build(name)
    networks.set_running_statistics(model, torch.randn(8, 3, options.size, options.size))
    model.eval()
    comparison = Comparison(1)

    def add(candidate: str, call: Callable[[], object]) -> None:
        sample = time_calls("evaluation", call, comparison.calls)

        def after_a_call() -> Sample:
            # not timed: the threads of the candidate before still wait in loops, on the same cores
            until = time.perf_counter() + _PAUSE
            while True:
                call()
                if time.perf_counter() > until:
                    return sample()

        comparison.candidates[candidate] = after_a_call

    small = torch.randn(1, 3, 64, 64)
    folded, _ = fold(model, small)
    add("ours", _eager(folded, x))
    packed, _ = fold(model, small, pack=True)
    add("ours, packed", _eager(packed, x))
    add("torch", _eager(deepcopy(model), x))
    try:
        add("fx", _eager(_fused(model), x))
    except Exception as error:
        comparison.notes.append(f"torch.fx's fuse failed with {type(error).__name__}")
    if options.compile:
        comparison.add_compiled(
            time_calls("evaluation", _eager(compile_static(deepcopy(model)), x), comparison.calls)
        )
    if all(map(find_spec, _ONNX)):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's exporter, for its authors
            ours, theirs = Path(folder) / "ours.onnx", Path(folder) / "torch.onnx"
            write_onnx(folded, ours, (x,), False, None)  # as bn.export does
            torch.onnx.export(model, (x,), theirs, dynamo=True, external_data=False, verbose=False)
            add("ours, ONNX Runtime", _onnx(ours, x))
            add("torch, ONNX Runtime", _onnx(theirs, x))
            yield comparison
    else:
        comparison.notes.append("ONNX Runtime is not compared: onnx, onnxscript and onnxruntime are needed")
        yield comparison


def _fused(model: nn.Module) -> nn.Module:
    fuse: Any = importlib.import_module("torch.fx.experimental.optimization").fuse
    fused: nn.Module = fuse(deepcopy(model))
    return fused


def _eager(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    model, images = (
        model.to(memory_format=FORMATS["channels-last"]),
        x.contiguous(memory_format=torch.channels_last),
    )

    def call() -> Tensor:
        with torch.inference_mode():
            output: Tensor = model(images)
        return output

    call()  # raises here what it raises
    return call


def _onnx(path: Path, x: Tensor) -> Callable[[], object]:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # else its threads wait in a loop after a run, on the cores of the next candidate
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)
