"""`batchnorm bench`: what can be measured, and with which options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli import measurement

app = typer.Typer(
    help="Measure speed here: our layers, torch's, and a copy, taking turns.",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench kernels         layers, forward and backward, 3 min\n\n"
    "batchnorm bench step            training steps of known networks, 8 min\n\n"
    "batchnorm bench infer           layers and networks in evaluation, 3 min\n\n"
    "batchnorm bench statistics      Sync, Ghost, masks and others, 3 min\n\n"
    "batchnorm bench scaling         Sync over 1, 2 and 4 processes, 4 min\n\n"
    "batchnorm bench all --quick     does all of it run, in seconds",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_Seconds = Annotated[
    float | None, typer.Option(min=0, help="How long the rounds of one row take.", show_default="SEC")
]
_Dtypes = Annotated[str, typer.Option(help="Of the layers' inputs, separated by commas.")]
_Networks = Annotated[
    str | None,
    typer.Option(
        help="Separated by commas.", show_default="mlp,resnet18,resnet50,googlenet,densenet121,mobilenet_v2"
    ),
]
_Size = Annotated[int, typer.Option(min=32, help="Height and width of the networks' images.")]
_Batch = Annotated[int, typer.Option(min=2, help="Images in a batch; the MLP has the paper's 60.")]
_Full = Annotated[bool, typer.Option("--full", help="BN alone, and BN with a residual and ReLU, too.")]
_Compile = Annotated[
    bool, typer.Option("--compile", help="Let torch.compile take part; compiling takes minutes.")
]
_Threads = Annotated[
    int | None, typer.Option(min=1, help="torch's threads.", show_default="as torch has them")
]
_Quick = Annotated[
    bool, typer.Option("--quick", help="Tiny shapes, three rounds: does it run, not how fast.")
]
_Out = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="The folder of results.", show_default="runs/bench-DATE-TIME"),
]


@app.command(
    "kernels",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench kernels                           BN+ReLU, 3 min\n\n"
    "batchnorm bench kernels --full --dtypes float32   BN and BN+add+ReLU too\n\n"
    "batchnorm bench kernels --threads 1               on one core",
)
def kernels(
    dtypes: _Dtypes = "float32,bfloat16",
    full: _Full = False,
    compile: _Compile = False,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = False,
    out: _Out = None,
) -> None:
    """BN+ReLU in training, forward and backward, in milliseconds and in copies of the input.

    Inputs are cold: they come from more than 300 MB of buffers. Candidates
    take turns in every round, so a ratio compares times of the same moment.
    Writes tables, a picture and the numbers into a folder; Ctrl-C keeps what
    was measured.
    """
    measurement.take(
        ("kernels",), out, threads, dtypes=dtypes, full=full, compile=compile, seconds=seconds, quick=quick
    )


@app.command(
    "step",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench step                                 all networks, 8 min\n\n"
    "batchnorm bench step --networks resnet18 --size 96   one, on larger images",
)
def step(
    networks: _Networks = None,
    size: _Size = 64,
    batch: _Batch = 32,
    compile: _Compile = False,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = False,
    out: _Out = None,
) -> None:
    """Whole training steps: forward, loss, backward, SGD.

    Ours is `bn.upgrade` of torch's network; the same network without BN shows
    what there is to win. At the end each network is trained as we would,
    channels-last and with memory kept, against torch as it comes, each in a
    process of its own.
    """
    measurement.take(
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
    "infer",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench infer                       layers and networks, 3 min\n\n"
    "batchnorm bench infer --networks resnet50   the layers, and one network",
)
def infer(
    dtypes: _Dtypes = "float32,bfloat16",
    networks: _Networks = None,
    size: _Size = 64,
    batch: _Batch = 32,
    compile: _Compile = False,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = False,
    out: _Out = None,
) -> None:
    """Evaluation: BN+ReLU in one pass over memory, and whole networks."""
    measurement.take(
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
    "statistics",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench statistics             all of them, 3 min\n\n"
    "pip install keras timm                 and theirs take part",
)
def statistics(
    size: _Size = 64,
    batch: _Batch = 32,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = False,
    out: _Out = None,
) -> None:
    """Ghost, Renorm, Population, masks, Sync over two ranks, virtual batches.

    Each beside the same layer without it, which is what it costs, and beside
    what torch, timm and Keras offer. The last row is ResNet-18 in micro-batches.
    """
    measurement.take(("statistics",), out, threads, size=size, batch=batch, seconds=seconds, quick=quick)


@app.command(
    "scaling",
    epilog="[bold]Example[/]\n\nbatchnorm bench scaling --out benchmarks   a part of RESULTS.md, 4 min",
)
def scaling(
    batch: _Batch = 32,
    seconds: _Seconds = None,
    quick: _Quick = False,
    out: _Out = None,
) -> None:
    """A training step in 1, 2 and 4 processes: what Sync adds to it.

    The processes have a thread each and are joined by gloo; each trains the
    paper's Inception, of quarter width, on images of 28 pixels. Beside it
    stands what bare collectives, measured here too, say that Sync must cost.
    """
    measurement.take(("scaling",), out, None, batch=batch, seconds=seconds, quick=quick)


@app.command(
    "all",
    epilog="[bold]Example[/]\n\nbatchnorm bench all --out benchmarks   writes benchmarks/RESULTS.md, 25 min",
)
def everything(
    full: _Full = False,
    compile: _Compile = False,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = False,
    out: _Out = None,
) -> None:
    """All of them, one after the other, on one page."""
    from batchnorm.bench.rows import COMMANDS

    measurement.take(COMMANDS, out, threads, full=full, compile=compile, seconds=seconds, quick=quick)
