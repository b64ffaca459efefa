"""`batchnorm bench`: the benchmarks and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.bench.options import FOLDED, LARGE, NETWORKS, Options
from batchnorm.cli import measurement
from batchnorm.cli.model_options import as_typed, model_option

app = typer.Typer(rich_markup_mode="rich")

_DEFAULTS = Options()
_DTYPES = as_typed(_DEFAULTS.dtypes)
_Seconds = Annotated[float | None, model_option(Options, "seconds", show_default="SEC")]
_Dtypes = Annotated[str, model_option(Options, "dtypes", show_default=True)]
_Networks = Annotated[
    str | None,
    model_option(Options, "networks", show_default=", ".join(NETWORKS)),
]
_Size = Annotated[int, model_option(Options, "size", show_default=True)]
_Batch = Annotated[int, model_option(Options, "batch", show_default=True)]
_Full = Annotated[bool, model_option(Options, "full", "--full")]
_Compile = Annotated[bool, model_option(Options, "compile", "--compile")]
_Device = Annotated[str, model_option(Options, "device", show_default=True)]
_Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of torch.", show_default="torch's default")
]
_Quick = Annotated[bool, model_option(Options, "quick", "--quick")]
_Out = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="The folder of results.", show_default="runs/bench-DATE-TIME"),
]


@app.command(
    "kernels",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench kernels                           BN+ReLU, 3 min\n\n"
    "batchnorm bench kernels --full --dtypes float32   BN and BN+add+ReLU too\n\n"
    "batchnorm bench kernels --threads 1               on one core\n\n"
    "batchnorm bench kernels --device cuda --compile   Triton's kernels, on a GPU",
)
def kernels(
    dtypes: _Dtypes = _DTYPES,
    full: _Full = _DEFAULTS.full,
    device: _Device = _DEFAULTS.device,
    compile: _Compile = _DEFAULTS.compile,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = _DEFAULTS.quick,
    out: _Out = None,
) -> None:
    """BN+ReLU in training, forward and backward, in milliseconds and in copies of the input.

    Inputs are cold: they come from more than 300 MB of buffers. Every round
    measures each candidate once, and ratios are taken within a round. Writes
    tables, a figure and the numbers into a folder; Ctrl-C keeps the finished
    rows.
    """
    measurement.run(
        ("kernels",),
        out,
        threads,
        dtypes=dtypes,
        full=full,
        device=device,
        compile=compile,
        seconds=seconds,
        quick=quick,
    )


@app.command(
    "step",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench step                                 all networks, 8 min\n\n"
    "batchnorm bench step --networks resnet18 --size 96   one, on larger images",
)
def step(
    networks: _Networks = None,
    size: _Size = _DEFAULTS.size,
    batch: _Batch = _DEFAULTS.batch,
    compile: _Compile = _DEFAULTS.compile,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = _DEFAULTS.quick,
    out: _Out = None,
) -> None:
    """Whole training steps: forward, loss, backward, SGD.

    Ours is `bn.upgrade` of torch's network; the same network without BN is
    the upper bound. At the end each network is trained with our settings,
    channels-last and with freed memory kept, and with torch's defaults, in
    separate processes.
    """
    measurement.run(
        ("step",),
        out,
        threads,
        networks=networks,
        size=size,
        batch=batch,
        compile=compile,
        seconds=seconds,
        quick=quick,
    )


@app.command(
    "memory",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench memory                             six networks, 6 min\n\n"
    "batchnorm bench memory --networks resnet50 --compile   one, against torch.compile too",
)
def memory(
    networks: Annotated[str | None, model_option(Options, "networks", show_default=", ".join(LARGE))] = None,
    size: Annotated[int, model_option(Options, "size", show_default=True)] = 96,
    batch: _Batch = _DEFAULTS.batch,
    compile: _Compile = _DEFAULTS.compile,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = _DEFAULTS.quick,
    out: _Out = None,
) -> None:
    """The memory of a training step, and its time, after bn.save_memory.

    Against torch's layers, ours without it, and torch.utils.checkpoint around
    each block: the peak beyond weights and gradients, what is saved for the
    backward pass, and the time of a step.
    """
    measurement.run(
        ("memory",),
        out,
        threads,
        networks=networks,
        size=size,
        batch=batch,
        compile=compile,
        seconds=seconds,
        quick=quick,
    )


@app.command(
    "infer",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench infer                       layers and networks, 3 min\n\n"
    "batchnorm bench infer --networks resnet50   the layers, and one network",
)
def infer(
    dtypes: _Dtypes = _DTYPES,
    networks: _Networks = None,
    size: _Size = _DEFAULTS.size,
    batch: _Batch = _DEFAULTS.batch,
    compile: _Compile = _DEFAULTS.compile,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = _DEFAULTS.quick,
    out: _Out = None,
) -> None:
    """Evaluation: BN+ReLU in one pass over memory, and whole networks."""
    measurement.run(
        ("infer",),
        out,
        threads,
        dtypes=dtypes,
        networks=networks,
        size=size,
        batch=batch,
        compile=compile,
        seconds=seconds,
        quick=quick,
    )


@app.command(
    "fold",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench fold                                  twelve networks, 6 min\n\n"
    "batchnorm bench fold --networks resnet18 --batches 1  one, an image at a time\n\n"
    "batchnorm bench fold --compile                        against torch.compile too",
)
def fold(
    networks: Annotated[str | None, model_option(Options, "networks", show_default=", ".join(FOLDED))] = None,
    batches: Annotated[str, model_option(Options, "batches", show_default=True)] = as_typed(
        _DEFAULTS.batches
    ),
    size: Annotated[int, model_option(Options, "size", show_default=True)] = 224,
    compile: _Compile = _DEFAULTS.compile,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = _DEFAULTS.quick,
    out: _Out = None,
) -> None:
    """Networks folded by bn.fold, against torch's, torch.fx's fuse and ONNX Runtime.

    All have channels-last memory. ONNX Runtime, where it is installed, runs
    what bn.export wrote and what torch.onnx.export did, with as many threads
    as torch.
    """
    measurement.run(
        ("fold",),
        out,
        threads,
        networks=networks,
        batches=batches,
        size=size,
        compile=compile,
        seconds=seconds,
        quick=quick,
    )


@app.command(
    "statistics",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench statistics             all of them, 3 min\n\n"
    "pip install keras timm                 compare with theirs too",
)
def statistics(
    size: _Size = _DEFAULTS.size,
    batch: _Batch = _DEFAULTS.batch,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = _DEFAULTS.quick,
    out: _Out = None,
) -> None:
    """Ghost, Renorm, Population, masks, Sync over two ranks, virtual batches.

    Each is compared with the plain layer, which gives its cost, and with the
    implementations of torch, timm and Keras. The last row is ResNet-18 in
    micro-batches.
    """
    measurement.run(("statistics",), out, threads, size=size, batch=batch, seconds=seconds, quick=quick)


@app.command(
    "scaling",
    epilog="[bold]Example[/]\n\nbatchnorm bench scaling --out benchmarks   a part of RESULTS.md, 4 min",
)
def scaling(
    batch: _Batch = _DEFAULTS.batch,
    seconds: _Seconds = None,
    quick: _Quick = _DEFAULTS.quick,
    out: _Out = None,
) -> None:
    """A training step in 1, 2 and 4 processes, with and without Sync.

    The processes have one thread each and form a gloo group; each trains the
    paper's Inception, of quarter width, on images of 28 pixels. The cost of
    Sync is also predicted from its collectives, measured alone.
    """
    measurement.run(("scaling",), out, None, batch=batch, seconds=seconds, quick=quick)


@app.command(
    "all",
    epilog="[bold]Example[/]\n\nbatchnorm bench all --out benchmarks   writes benchmarks/RESULTS.md, 25 min",
)
def everything(
    full: _Full = _DEFAULTS.full,
    compile: _Compile = _DEFAULTS.compile,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = _DEFAULTS.quick,
    out: _Out = None,
) -> None:
    """All benchmarks, one after the other, on one page."""
    from batchnorm.bench.rows import COMMANDS

    measurement.run(COMMANDS, out, threads, full=full, compile=compile, seconds=seconds, quick=quick)
