"""The command line; thin. What a command needs is imported when it runs: `--help` must not wait for torch."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from batchnorm.bench.options import Options
    from batchnorm.bench.rows import Command
    from batchnorm.experiments.claim import Settings

app = typer.Typer(
    help="Batch Normalization for PyTorch: see the paper's claims hold, each by one command.",
    epilog="Start here:  batchnorm reproduce mnist",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
reproduce = typer.Typer(
    help="Reproduce an experiment of the paper (Ioffe & Szegedy 2015).", no_args_is_help=True
)
app.add_typer(reproduce, name="reproduce")
bench = typer.Typer(
    help="Measure speed here: our layers, torch's, and a copy, taking turns.",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench kernels         layers, forward and backward, 3 min\n\n"
    "batchnorm bench step            training steps of known networks, 8 min\n\n"
    "batchnorm bench infer           layers and networks in evaluation, 3 min\n\n"
    "batchnorm bench all --quick     does all of it run, in seconds",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(bench, name="bench")

_RUNS = Path("runs")


@reproduce.command(
    "mnist",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm reproduce mnist                       figure 1, 2.5 min on 2 cores\n\n"
    "batchnorm reproduce mnist --claims all          every claim, about 12 min\n\n"
    "batchnorm reproduce mnist --data fashion-mnist  the same on clothes\n\n"
    "batchnorm reproduce mnist --resume              go on with a stopped run",
)
def mnist(
    data: Annotated[
        str | None,
        typer.Option(
            help="mnist-10k (the digits in this package), mnist, fashion-mnist, or a folder of IDX files, "
            "gzipped or not.",
            show_default="mnist-10k",
        ),
    ] = None,
    claims: Annotated[
        str | None,
        typer.Option(
            help="Claims to test, separated by commas, or 'all'; 'list' shows them.", show_default="figure-1"
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the longest run; no run is longer.", show_default="50000"),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="How many seeds, 0, 1, ..., the verdict averages over.", show_default="3"),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="The learning rate that both networks of figure 1 share.", show_default="0.1"),
    ] = None,
    init_std: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the hidden layers' initial weights (not for the claims that vary it).",
            show_default="0.1",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="The run's folder.", show_default="runs/mnist-DATE-TIME"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in --out, or with the newest one, to the same numbers."
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Networks trained at the same time.", show_default="one a core")
    ] = None,
) -> None:
    """The handwritten digits of section 4.1 and figure 1: the same network with and without batch normalization.

    Trains 784-100-100-100-10 sigmoid networks on binary 28×28 digits in batches of 60 and writes a folder with
    records.jsonl, TensorBoard events, figures and report.html. Ctrl-C loses nothing: --resume goes on.
    """
    from batchnorm.experiments.mnist import claim_names, claim_title

    if claims == "list":
        for name in claim_names():
            typer.echo(f"{name:24} {claim_title(name)}")
        return
    chosen: dict[str, Any] = {
        "data": data,
        "steps": steps,
        "seeds": seeds,
        "rate": rate,
        "init_std": init_std,
        "claims": claims
        and (claim_names() if claims == "all" else tuple(claims.replace(" ", "").split(","))),
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    folder = _newest_run(out) if resume else out or _RUNS / f"mnist-{datetime.now():%Y%m%d-%H%M%S}"
    _reproduce(folder, chosen, resume, workers)


def _reproduce(folder: Path, chosen: dict[str, Any], resume: bool, workers: int | None) -> None:
    from rich.console import Console

    from batchnorm.data.digits import Digits
    from batchnorm.data.idx import DataError
    from batchnorm.experiments.mnist import mnist_experiment
    from batchnorm.experiments.progress import Display, summary
    from batchnorm.experiments.run import Stopped
    from batchnorm.records import RecordError
    from batchnorm.training.checkpoint import CheckpointError
    from batchnorm.training.workers import WorkerDied

    console = Console()
    go_on = f"batchnorm reproduce mnist --out {shlex.quote(str(folder))} --resume"
    with _in_one_line(DataError, RecordError, CheckpointError):
        settings = _settings(folder, chosen, resume)
        # what is wrong with the data is said here, in one line, and not by a worker
        experiment = mnist_experiment(settings, Digits.load(settings.data))
        with _in_one_line(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        _print(console, f"run folder  {folder}")
        try:
            with Display(console) as display:
                verdicts = experiment.run(settings, folder, _command(folder), display, workers)
        except (Stopped, KeyboardInterrupt):
            if (folder / "report.html").exists():
                _print(console, f"\nStopped. What there is:  {folder / 'report.html'}")
            _print(console, f"Go on with:  {go_on}")
            raise typer.Exit(130) from None
        except (WorkerDied, OSError) as error:
            raise Failure(f"{error}; nothing that was saved is lost, go on with: {go_on}") from None
    console.print(summary(verdicts))
    _print(console, f"report  {folder / 'report.html'}")


def _print(console: Console, text: str) -> None:
    """Print `text` as it is: a path may hold what rich would take for markup, or for a line to break."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _command(folder: Path) -> str:
    """The command line for the record, with the run's folder, so that --resume can be added to it."""
    command = shlex.join(["batchnorm", *sys.argv[1:]])
    if not any(word == "--out" or word.startswith("--out=") for word in sys.argv):
        command += f" --out {shlex.quote(str(folder))}"
    return command.encode(errors="surrogateescape").decode(errors="replace")  # a path need not be text


def _settings(folder: Path, chosen: dict[str, Any], resume: bool) -> Settings:
    """Those of the run that is continued, or the chosen ones for a new run."""
    from pydantic import ValidationError

    from batchnorm.experiments.claim import Settings
    from batchnorm.experiments.mnist import claim_names
    from batchnorm.records import Run, read

    path = folder / "records.jsonl"
    if not resume:
        if path.exists():
            raise Failure(
                f"{folder} holds a run already: add --resume to go on with it, or choose another --out"
            )
        unknown = set(chosen.get("claims", ())) - set(claim_names())
        if unknown:
            names = ", ".join(claim_names())
            raise Failure(f"no claim {', '.join(sorted(unknown))}: choose from {names}, or all")
        try:
            return Settings(**chosen)
        except ValidationError as error:
            first = error.errors()[0]
            raise Failure(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from None
    head = next(read(path), None)
    if not isinstance(head, Run):
        raise Failure(f"{path} does not begin with a run record: it is not a run that can be continued")
    try:
        settings = Settings.model_validate(head.config)
    except ValidationError as error:
        raise Failure(
            f"{path} was written by another version: {error.errors()[0]['msg']}; start a new run"
        ) from None
    changed = [name for name, value in chosen.items() if getattr(settings, name) != value]
    if changed:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise Failure(f"{options} cannot change when a run is continued; leave it out, or start a new run")
    return settings


def _newest_run(out: Path | None) -> Path:
    if out is not None:
        return out
    runs = sorted(_RUNS.glob("mnist-*/records.jsonl"), key=lambda path: -path.stat().st_mtime)
    if not runs:
        raise Failure(f"no run to continue in {_RUNS}/: name its folder with --out")
    return next((path for path in runs if not _complete(path)), runs[0]).parent


def _complete(path: Path) -> bool:
    """Whether a run came to its end: its last record is a verdict, and not that it is incomplete."""
    from batchnorm.records import RecordError, Verdict, read

    try:
        *_, last = read(path)
    except (RecordError, ValueError):  # broken, or empty
        return False
    return isinstance(last, Verdict) and last.outcome != "incomplete"


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


@bench.command(
    "kernels",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench kernels                           BN+ReLU, 3 min\n\n"
    "batchnorm bench kernels --full --dtypes float32   BN and BN+add+ReLU too\n\n"
    "batchnorm bench kernels --threads 1               on one core",
)
def bench_kernels(
    dtypes: _Dtypes = "float32,bfloat16",
    full: _Full = False,
    compile: _Compile = False,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = False,
    out: _Out = None,
) -> None:
    """BN+ReLU in training, forward and backward, in milliseconds and in copies of the input.

    Inputs are cold: they come from more than 300 MB of buffers. Contenders
    take turns in every round, so a ratio compares times of the same moment.
    Writes tables, a picture and the numbers into a folder; Ctrl-C keeps what
    was measured.
    """
    _bench(
        ("kernels",), out, threads, dtypes=dtypes, full=full, compile=compile, seconds=seconds, quick=quick
    )


@bench.command(
    "step",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench step                                 all networks, 8 min\n\n"
    "batchnorm bench step --networks resnet18 --size 96   one, on larger images",
)
def bench_step(
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
    _bench(
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


@bench.command(
    "infer",
    epilog="[bold]Examples[/]\n\n"
    "batchnorm bench infer                       layers and networks, 3 min\n\n"
    "batchnorm bench infer --networks resnet50   the layers, and one network",
)
def bench_infer(
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
    _bench(
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


@bench.command(
    "all",
    epilog="[bold]Example[/]\n\nbatchnorm bench all --out benchmarks   writes benchmarks/RESULTS.md, 15 min",
)
def bench_all(
    full: _Full = False,
    compile: _Compile = False,
    seconds: _Seconds = None,
    threads: _Threads = None,
    quick: _Quick = False,
    out: _Out = None,
) -> None:
    """The three of them, one after the other, on one page."""
    from batchnorm.bench.rows import COMMANDS

    _bench(COMMANDS, out, threads, full=full, compile=compile, seconds=seconds, quick=quick)


# How long a row takes unless told, in seconds: together a few minutes.
_ROW_SECONDS = {"kernels": 5.0, "step": 20.0, "infer": 2.5}


def _bench(
    commands: tuple[Command, ...], out: Path | None, threads: int | None, *, quick: bool, **chosen: Any
) -> None:
    import torch
    from rich.console import Console

    from batchnorm.bench import page, table
    from batchnorm.bench.display import Display
    from batchnorm.bench.measure import measure
    from batchnorm.bench.rows import ResultsError

    if threads is not None:
        torch.set_num_threads(threads)
    folder = out or _RUNS / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    line = shlex.join(["batchnorm", *sys.argv[1:]])
    console = Console()
    with _in_one_line(ResultsError, OSError), Display(console) as display:
        for command in commands:
            options = _options(command, quick, chosen)
            measured = measure(command, options, line, display)
            written = page.write(measured, folder)
            for grid in table.grids(measured):
                console.print(table.drawn(grid), "")
            for note in measured.notes:
                _print(console, note)
            if not measured.finished:
                _print(console, f"Stopped. What there is:  {written}")
                raise typer.Exit(130)
    console.print(table.NOTE, style="dim")
    _print(console, f"\nresults  {written}")


def _options(command: Command, quick: bool, chosen: dict[str, Any]) -> Options:
    """Of one command; what was not chosen takes its default."""
    from pydantic import ValidationError

    from batchnorm.bench.networks import NETWORKS
    from batchnorm.bench.options import Options

    values = {name: value for name, value in chosen.items() if value is not None}
    for name in {"dtypes", "networks"} & values.keys():
        values[name] = tuple(values[name].replace(" ", "").split(","))
    if command == "kernels":
        values.pop("networks", None)
    else:
        values.setdefault("networks", ("mlp", "resnet18") if quick else tuple(NETWORKS))
    unknown = set(values.get("networks", ())) - set(NETWORKS)
    if unknown:
        raise Failure(f"no network {', '.join(sorted(unknown))}: choose from {', '.join(NETWORKS)}")
    if set(values.get("networks", ())) > {"mlp"} and not find_spec("torchvision"):
        raise Failure("the networks are torchvision's: pip install 'batchnorm[train]', or --networks mlp")
    if quick:
        values = {"seconds": 0.0} | values | {"least": 3, "size": 32, "batch": 2, "quick": True}
    values.setdefault("seconds", _ROW_SECONDS[command])
    try:
        return Options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise Failure(f"--{first['loc'][0]}: {first['msg']}") from None


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(help="A run's folder, with its records.jsonl.")],
) -> None:
    """Draw a run's figures and its report.html again from records.jsonl; needs no torch."""
    from batchnorm import report
    from batchnorm.records import RecordError

    with _in_one_line(RecordError, OSError):
        typer.echo(report.build(run))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    if version:
        from batchnorm import __version__

        typer.echo(f"batchnorm {__version__}")
        raise typer.Exit


class Failure(Exception):
    """What the user can put right; shown in one line, without a traceback."""


@contextmanager
def _in_one_line(*expected: type[Exception]) -> Iterator[None]:
    """Turn errors whose message says all there is to know into a `Failure`."""
    try:
        yield
    except expected as error:
        raise Failure(str(error)) from None


def main() -> None:
    """The `batchnorm` command."""
    for stream in (sys.stdout, sys.stderr):  # a locale that has no × shall not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except Failure as failure:
        typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(str(failure), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
