"""`batchnorm examine` and `batchnorm explain`: bugs with batch normalization in a network, and what they are."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli import named_model, state_file
from batchnorm.cli.image_batches import (
    Batches,
    BatchSizeOption,
    ImagesOption,
    MeanOption,
    SizeOption,
    StdOption,
)
from batchnorm.cli.layers_table import warn_of_random_weights
from batchnorm.cli.named_model import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    SetOption,
    WeightsOption,
)
from batchnorm.cli.state_file import OutOption
from batchnorm.cli.terminal import Failure, as_failure, command_line, one_of, show, words

if TYPE_CHECKING:
    from rich.console import Console

    from batchnorm.diagnostics.check import Check
    from batchnorm.diagnostics.finding import Finding, Findings

EPILOG = (
    "[bold]Examples[/]\n\n"
    "batchnorm examine torchvision:resnet18 --weights resnet18.pth --data FOLDER\n\n"
    "batchnorm examine timm:mobilenetv3_small_050 --select BN1\n\n"
    "batchnorm examine runs/NAME --data mnist-10k --format github\n\n"
    "batchnorm explain BN405"
)
EXPLAIN_EPILOG = "[bold]Examples[/]\n\nbatchnorm explain BN405\n\nbatchnorm explain stale-statistics"
FORMATS = ("text", "json", "sarif", "github")
_SHOWN = 3  # findings of one check; of the others the layers are listed
_STYLES = {"error": "red", "warning": "yellow", "info": "cyan"}
_FAIL_ON = {"error": ("error",), "warning": ("error", "warning"), "never": ()}


class Unexamined(Failure):
    """A network that could not be examined: another exit status than findings have."""

    status = 2


def examine(
    model: ModelArgument,
    weights: WeightsOption = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="The data set, named as in run.toml; batches of its training split, in a random order.",
            show_default="the network alone is examined",
        ),
    ] = None,
    images: ImagesOption = None,
    batch_size: BatchSizeOption = 32,
    batches: Annotated[int, typer.Option(min=1, help="How many batches.")] = 8,
    select: Annotated[
        str | None,
        typer.Option(
            metavar="CODES", help="Codes, their beginnings or names, by commas.", show_default="all checks"
        ),
    ] = None,
    ignore: Annotated[
        str | None, typer.Option(metavar="CODES", help="Likewise, what is left out.", show_default="none")
    ] = None,
    use: Annotated[
        str | None,
        typer.Option(
            metavar="training|inference|export|private|federated",
            help="What the network is for.",
            show_default=False,
        ),
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Mend what can be mended without a decision, and list it.")
    ] = False,
    out: OutOption = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page to look at, NAME.html.", show_default=False),
    ] = None,
    output: Annotated[
        str, typer.Option("--format", metavar="|".join(FORMATS), help="Of what is printed.")
    ] = "text",
    as_json: JsonOption = False,
    fail_on: Annotated[
        str,
        typer.Option(metavar="error|warning|never", help="The least severity that makes the exit status 1."),
    ] = "warning",
    size: SizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    settings: SetOption = None,
    dtype: DtypeOption = "float32",
) -> None:
    """Find bugs with batch normalization that no error shows, as a linter does in a text.

    Without --data what the network alone shows is looked at: its layers,
    and what is before each, in a run on a made-up image. With it also
    what comes to each layer. Checks are left out by --ignore, or in the
    section tool.batchnorm of pyproject.toml, there for layers too: docs/doctor.md.

    Exit status: 0 nothing serious, 1 findings, 2 could not be examined.
    """
    from rich.console import Console

    from batchnorm.diagnostics.examine import examine as look
    from batchnorm.diagnostics.written import save, written

    console = Console(stderr=True)
    with _unexamined():
        state_file.check(out)
        if report is not None and report.suffix != ".html":
            raise Failure(f"--report {report}: write a page, NAME.html")
        if report is not None and not report.parent.is_dir():
            raise Failure(f"--report {report}: there is no folder {report.parent}: make it first")
        if out is not None and not fix:
            raise Failure("--out writes the weights of a network that was mended: add --fix")
        kind = "json" if as_json else one_of(FORMATS, output, "--format")
        failing = _FAIL_ON[one_of(_FAIL_ON, fail_on, "--fail-on")]
        chosen, left_out = _chosen(select, ignore)
        named = named_model.find(model, weights, settings or (), (), dtype, needs_example=False)
        if not named.has_weights:
            named.model.train()  # new, and about to be trained
        given = None if data is None else Batches(named, data, images, batch_size, size, mean, std)
        with as_failure(ValueError), console.status("examining", spinner="dots"):
            found = look(
                named.model,
                given,
                select=chosen,
                ignore=left_out,
                limit=batches,
                fix=fix,
                use=use,  # type: ignore[arg-type]
            )
        if out is not None:
            state_file.write(named.model.state_dict(), out)
        if report is not None:
            with as_failure(ImportError, OSError):
                save(found, report, model, command=command_line())
    if kind == "text":
        show_findings(Console(), found)
        warn_of_random_weights(console, named.has_weights)
    else:
        typer.echo(written(found, kind, model, command=command_line()))  # type: ignore[arg-type]
    if report is not None:
        show(console, str(report))
    if out is not None:
        show(console, state_file.size(out))
    if any(each.severity in failing for each in found):
        raise typer.Exit(1)


@contextmanager
def _unexamined() -> Iterator[None]:
    """A Failure inside has the exit status of a network that could not be examined."""
    try:
        yield
    except Failure as failure:
        raise Unexamined(str(failure)) from None


def explain(
    check: Annotated[
        str,
        typer.Argument(
            metavar="CODE", help="Its code, BN405, or its name, stale-statistics.", show_default=False
        ),
    ],
) -> None:
    """Say what a check looks for: symptom, reason, where that is known from, and whether --fix mends it."""
    from rich.console import Console

    from batchnorm.diagnostics.examine import selected

    with as_failure(ValueError):
        chosen, _ = selected([check], [])
    for number, each in enumerate(chosen):
        _explain(Console(), each, number)


def _explain(console: Console, check: Check, number: int) -> None:
    if number:
        console.print()
    show(console, f"{check.code} {check.name} ({check.severity})", "bold")
    rows = [("symptom", check.symptom), ("why", check.why), ("source", check.source)]
    rows.append(("--fix", "mends it" if check.fixes else "does not: what to do is a decision"))
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in rows:
        table.add_row(name, text)
    console.print(table, markup=False, highlight=False)


def show_findings(console: Console, found: Findings) -> None:
    """What was fixed, a row for each finding with its fix below, and why checks were not made."""
    from rich.markup import escape
    from rich.table import Table

    for fixed in found.fixed:
        show(
            console,
            f"fixed {fixed.finding.code} {fixed.finding.layer or '(the model)'}: {fixed.change}",
            "green",
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("code", "severity", "layer", "finding"):
        table.add_column(name, overflow="fold", no_wrap=name in ("code", "severity"))
    alike: dict[tuple[str, str], list[Finding]] = {}
    for each in found:
        alike.setdefault((each.severity, each.code), []).append(each)
    for (severity, code), group in alike.items():
        shown = group if len(group) <= _SHOWN + 1 else group[:_SHOWN]
        for each in shown:
            text = escape(each.message) + (f"\n[dim]→ {escape(each.fix)}[/]" if each.fix else "")
            table.add_row(
                code, f"[{_STYLES[severity]}]{severity}[/]", escape(each.layer) or "(the model)", text
            )
        if len(shown) < len(group):
            paths = ", ".join(each.layer for each in group[_SHOWN:])
            table.add_row("", "", f"and {len(group) - _SHOWN} more", f"[dim]{escape(paths)}[/]")
    if found:
        console.print(table, highlight=False)
    by_reason: dict[str, list[str]] = {}
    for code, why in found.skipped.items():
        by_reason.setdefault(why.partition(": ")[0], []).append(code)
    for why, codes in by_reason.items():
        show(console, f"not made, {why}: {', '.join(codes)}", "dim")
    show(console, found.summary, "bold")


def _chosen(select: str | None, ignore: str | None) -> tuple[Sequence[str], dict[str, Sequence[str]]]:
    """What the options and pyproject.toml choose: codes, and those left out by pattern. Raises: Failure."""
    configured = _configured()
    chosen = words(select) if select else configured.get("select", ())
    left_out = configured.get("ignore", {})
    patterns: dict[str, Sequence[str]] = dict(left_out) if isinstance(left_out, dict) else {"*": left_out}
    if ignore:
        patterns["*"] = [*patterns.get("*", ()), *words(ignore)]
    lists = [chosen, *patterns.values()]
    if any(isinstance(each, str) or not all(isinstance(code, str) for code in each) for each in lists):
        raise Failure(
            'section tool.batchnorm of pyproject.toml: write ignore = ["BN205"] or {"backbone.*" = ["BN205"]}'
        )
    return chosen, patterns


def _configured() -> dict[str, Any]:
    """`[tool.batchnorm]` of the pyproject.toml in this folder, or in the nearest above."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        file = folder / "pyproject.toml"
        if file.is_file():
            try:
                found = tomllib.loads(file.read_text()).get("tool", {}).get("batchnorm", {})
            except (tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as error:
                raise Failure(f"{file}: {error}") from None
            return found if isinstance(found, dict) else {}
    return {}
