"""`export(model, path, *example_inputs)`: fold, write for another runtime, compare, and only then keep the file."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from batchnorm.atomic_file import replacing
from batchnorm.graph.trace import parameters
from batchnorm.passes.fold.folded import FoldReport, fold
from batchnorm.passes.fold.proof import copy_of, detached, difference, outputs, random_like
from batchnorm.requirements import install_command

Format = Literal["onnx", "pt2", "safetensors"]
# of the largest output, by the widest dtype in which the outputs are compared
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ONNX_LIMIT = 2**31 - 2**20  # bytes of one protobuf file


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far its outputs are from the model's.

    Args:
        path: of the file.
        format: "onnx", "pt2" or "safetensors".
        folded: what became of each layer.
        error: the largest difference of an output of the file from the model's, as a share of the largest output.
        compared: the batch sizes with which it was compared, from the examples and from random inputs.
        size: of the file, in bytes.
    """

    path: Path
    format: Format
    folded: FoldReport
    error: float
    compared: tuple[int, ...]
    size: int

    def __str__(self) -> str:
        batches = " and ".join(map(str, self.compared))
        return (
            f"{self.folded}\n{self.path}: {self.format}, {self.size / 1e6:,.1f} MB; outputs differ by {self.error:.1e} "
            f"of the largest, with batches of {batches}"
        )

    __repr__ = __str__


def export(
    model: nn.Module,
    path: str | Path,
    *inputs: Tensor,
    dynamic: bool = True,
    to: Format | None = None,
    opset: int | None = None,
) -> ExportReport:
    """Fold a copy of `model`, write it for another runtime, and keep the file if it computes what the model does.

    onnx: the graph, for ONNX Runtime and others; inputs have the names of the forward's arguments, outputs `output`, or
    `output_0`, `output_1`, ...
    pt2: a program of torch.export, which `torch.export.load(path).module()` runs where this library is not.
    safetensors: the folded weights alone, by their names in the copy that `bn.fold` returns.

    What the file computes (ONNX Runtime for onnx) is compared with the model as it was given, from the example inputs,
    from random ones, and from a batch of another size where that is dynamic. The file is written under another name
    and renamed when all of that is right, so that at `path` there is never a part of a file, or a wrong one.

    Args:
        model: any module whose forward takes tensors by position.
        path: of the file; its suffix says the format.
        inputs: of its forward, for example.
        dynamic: whether the first dimension of all inputs, the batch, may have any size.
        to: the format, if the suffix does not say it.
        opset: of ONNX; None: torch's default.

    Returns: an `ExportReport`.

    Raises:
        ValueError: no format; no inputs; a layer normalizes by the batch in evaluation too; the batch cannot be
            dynamic; or what was written computes something else. The message says what to do, and no file is written.
        ModuleNotFoundError: names what has to be installed.

    Example:
        >>> import os, tempfile, torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = bn.export(model, os.path.join(folder, "model.pt2"), torch.randn(2, 3, 8, 8))
        >>> report.format, report.compared, report.error < 1e-6
        ('pt2', (2, 3), True)
    """
    path = Path(path)
    chosen = to or path.suffix.lstrip(".").lower()
    if chosen not in get_args(Format):
        raise ValueError(
            f"{path.name} has no suffix .onnx, .pt2 or .safetensors: give it one, or a format, to=..."
        )
    if not inputs or not all(isinstance(cast(object, each), Tensor) for each in inputs):
        raise ValueError("export needs example inputs, which are tensors: export(model, path, images)")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}: make it first")
    for package in _NEEDS[cast(Format, chosen)]:
        _need(package)
    inputs = detached(inputs)
    folded, report = fold(model, *inputs)
    by_batch = [layer.name for layer in report.layers if "by the batch in evaluation" in layer.why]
    if by_batch:
        raise ValueError(
            f"{', '.join(by_batch)} would normalize by the batch wherever the file runs: set track_running_stats=True "
            "and train, or measure running statistics first"
        )
    original = copy_of(model).eval()
    write, load = _WRITERS[cast(Format, chosen)]
    with replacing(path) as unfinished:
        write(folded, unfinished, inputs, dynamic, opset)
        error, compared = _compare(original, load(unfinished, folded), inputs, dynamic)
    return ExportReport(path, cast(Format, chosen), report, error, compared, path.stat().st_size)


_Run = Callable[..., list[Tensor]]


def _compare(
    original: nn.Module, run: _Run, inputs: tuple[Tensor, ...], dynamic: bool
) -> tuple[float, tuple[int, ...]]:
    """The largest error, and the sizes of the batches. Raises: ValueError."""
    batch = inputs[0].size(0) if inputs[0].dim() else 1
    cases = [inputs, random_like(inputs)]
    if dynamic:
        more = tuple(torch.cat([each, each[:1]]) for each in inputs)
        cases += [more, random_like(more)]
    worst = 0.0
    for case in cases:
        expected = outputs(original, case, {})
        error = difference(run(*case), expected)
        tolerance = (
            max((TOLERANCES.get(each.dtype, 0.0) for each in expected), default=0.0)
            or TOLERANCES[torch.float32]
        )
        if not error <= tolerance:
            raise ValueError(
                f"the outputs of what was written differ from the model's by {error:.1e} of the largest, for a batch "
                f"of {len(case[0])}, more than {tolerance:.0e}: no file is kept. Does the forward compute something "
                "outside of torch, or depend on the values of its inputs?"
            )
        worst = max(worst, error)
    return worst, (batch, batch + 1) if dynamic else (batch,)


def write_onnx(
    model: nn.Module, path: Path, inputs: tuple[Tensor, ...], dynamic: bool, opset: int | None
) -> None:
    size = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    if size > _ONNX_LIMIT:
        raise ValueError(
            f"the weights have {size / 1e9:.1f} GB, and one ONNX file at most 2: bn.fold the model and call "
            "torch.onnx.export(..., external_data=True)"
        )
    program = _program(model, inputs, dynamic)
    names = _names(model, len(inputs))
    number = len(program.graph_signature.user_outputs)
    made = ["output"] if number == 1 else [f"output_{at}" for at in range(number)]
    with _quiet():
        torch.onnx.export(
            program,
            inputs,
            path,
            dynamo=True,
            external_data=False,
            input_names=names,
            output_names=made,
            opset_version=opset,
            verbose=False,
        )
    importlib.import_module("onnx.checker").check_model(str(path))
    written = importlib.import_module("onnx").load(str(path))
    graph, version = written.graph, written.opset_import[0].version
    if opset is not None and version != opset:
        raise ValueError(
            f"torch's exporter has written opset {version}, not {opset}: choose that or a later one"
        )
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "BatchNormalization" and attribute.name == "training_mode" and attribute.i:
                raise ValueError(f"{node.name} normalizes by the batch")


def _load_onnx(path: Path, _: nn.Module) -> _Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own kinds
        raise ValueError(
            f"ONNX Runtime cannot run what torch has written ({_first_line(error)}): no file is kept. It has few "
            "operators in float64 and bfloat16: export the model in float32"
        ) from None
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        # an input on which nothing depends is none of the graph's
        given = {name: each.numpy(force=True) for name, each in zip(names, inputs, strict=False)}
        return [torch.from_numpy(each) for each in session.run(None, given)]

    return run


def _write_pt2(
    model: nn.Module, path: Path, inputs: tuple[Tensor, ...], dynamic: bool, _: int | None
) -> None:
    program = _program(model, inputs, dynamic)
    content = io.BytesIO()  # to a path it would warn of another suffix, and to a full disk raise RuntimeError
    with _quiet():
        torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def _load_pt2(path: Path, _: nn.Module) -> _Run:
    with _quiet():
        module = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda *inputs: outputs(module, inputs, {})


def _write_safetensors(
    model: nn.Module, path: Path, inputs: tuple[Tensor, ...], dynamic: bool, opset: int | None
) -> None:
    path.write_bytes(as_safetensors(model.state_dict()))


def as_safetensors(state: dict[str, Tensor]) -> bytes:
    """The content of a file with these tensors."""
    # copies, as two names may have one memory
    plain = {name: each.detach().cpu().contiguous().clone() for name, each in state.items()}
    content: bytes = importlib.import_module("safetensors.torch").save(plain, {"format": "pt"})
    return content


def _load_safetensors(path: Path, model: nn.Module) -> _Run:
    found = importlib.import_module("safetensors.torch").load(path.read_bytes())
    loaded = copy.deepcopy(model)
    for each in loaded.state_dict().values():
        each.zero_()  # so that what is not in the file is seen to be missing
    loaded.load_state_dict(found)
    return lambda *inputs: outputs(loaded, inputs, {})


_Write = Callable[[nn.Module, Path, tuple[Tensor, ...], bool, int | None], None]
_WRITERS: dict[Format, tuple[_Write, Callable[[Path, nn.Module], _Run]]] = {
    "onnx": (write_onnx, _load_onnx),
    "pt2": (_write_pt2, _load_pt2),
    "safetensors": (_write_safetensors, _load_safetensors),
}
_NEEDS: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2": (),
    "safetensors": ("safetensors",),
}


def _program(model: nn.Module, inputs: tuple[Tensor, ...], dynamic: bool) -> torch.export.ExportedProgram:
    """The program of torch.export. Raises: ValueError if the batch cannot be dynamic."""
    if not dynamic:
        with _quiet():
            return torch.export.export(model, inputs)
    if any(not each.dim() for each in inputs) or len({each.size(0) for each in inputs}) > 1:
        raise ValueError(
            "the inputs have no first dimension in common, the batch: pass dynamic=False (--fixed)"
        )
    batch = torch.export.Dim("batch", min=1)
    # examples of a batch of 1 would make that a constant
    examples = tuple(torch.cat([each, each]) if each.size(0) == 1 else each for each in inputs)
    try:
        with _quiet():
            return torch.export.export(model, examples, dynamic_shapes=tuple({0: batch} for _ in inputs))
    except Exception as error:
        with _quiet():
            torch.export.export(model, inputs)  # raises what is wrong with the model, if it is that
        lines = [line.strip() for line in str(error).splitlines() if "batch" in line]
        raise ValueError(
            f"the forward is for one size of the batch ({lines[0] if lines else type(error).__name__}): "
            "pass dynamic=False (--fixed)"
        ) from None


def _names(model: nn.Module, number: int) -> list[str]:
    """The names of the forward's arguments."""
    names = list(parameters(model) or {})[:number]
    return (
        names
        if len(names) == number
        else [f"input_{at}" for at in range(number)]
        if number > 1
        else ["input"]
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _need(package: str) -> None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"this needs {package}, which is not installed: {install_command('export')}", name=package
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters tell their own authors."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
