"""A folder of results: a JSON file and a figure for each command, and a page of all of them."""

from __future__ import annotations

from pathlib import Path

from batchnorm.bench import figure, table
from batchnorm.bench.rows import COMMANDS, Command, Measured, read
from batchnorm.report.tables import format_time

PAGE = "RESULTS.md"

_TITLES: dict[Command, str] = {
    "kernels": "Layers in training",
    "step": "Training steps",
    "memory": "Memory of a training step",
    "infer": "Evaluation",
    "fold": "Folded networks",
    "statistics": "Where the moments come from",
    "scaling": "Several processes",
}

_HEAD = f"""# Measured speed

Every round measures each candidate of a row once, in a rotating order. {table.NOTE}
"""


def write(measured: Measured, folder: Path) -> Path:
    """Write these results into `folder`, replacing older ones of the same command; return the path of the page.

    Raises: ResultsError when the file of another command in the folder is invalid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{measured.command}.json").write_text(
        measured.model_dump_json(indent=1) + "\n", encoding="utf-8"
    )
    if measured.rows:
        (folder / f"{measured.command}.png").write_bytes(figure.png(measured))
    page = folder / PAGE
    page.write_text(text([read(path) for path in _files(folder)]), encoding="utf-8")
    return page


def text(results: list[Measured]) -> str:
    """The page of these results."""
    return "\n".join([_HEAD, *map(_section, results)])


def _files(folder: Path) -> list[Path]:
    return [path for command in COMMANDS if (path := folder / f"{command}.json").exists()]


def _section(measured: Measured) -> str:
    parts = [
        f"## {_TITLES[measured.command]}",
        "```bash\n" + measured.line + "\n```",
        _setup(measured),
    ]
    if not measured.finished:
        parts.append("Stopped before the end: rows are missing.")
    if measured.notes:
        parts.append("\n".join(f"- {note}" for note in measured.notes))
    if measured.rows:
        parts.append(f"![{_TITLES[measured.command]}]({measured.command}.png)")
    parts += [table.markdown(grid) for grid in table.grids(measured)]
    if measured.command in table.FOOTNOTES:
        parts.append(table.FOOTNOTES[measured.command])
    return "\n\n".join(parts) + "\n"


def _setup(measured: Measured) -> str:
    options = measured.options
    rounds = [row.rounds for row in measured.rows]
    facts = [
        f"{format_time(measured.started)}; {measured.machine}; {measured.threads} thread{'s' * (measured.threads > 1)}",
        ", ".join(f"{name} {version}" for name, version in measured.versions.items()),
        f"{options.seconds:g} s a row"
        + (f", {min(rounds)} rounds or more" if rounds else "")
        + (", tiny shapes: not a measurement" if options.quick else ""),
        "freed memory kept by the process" if measured.kept_memory else "freed memory not kept",
    ]
    if measured.command == "fold":
        facts.append(f"images of {options.size}×{options.size}; all in channels-last memory")
    elif measured.options.networks:
        facts.append(
            f"batches of {options.batch} images of {options.size}×{options.size}, the MLP's of 60 digits"
        )
    facts += [f"{name}={value}" for name, value in measured.environment.items()]
    return ".\n".join(facts) + "."
