"""The report of a run: figures and one HTML page, made from its records alone. Does not import torch.

records.jsonl  ->  contents  the records by subject ->  page     report.html, one file
                                                    ->  figures  figures/NAME.png and NAME.svg
"""

from __future__ import annotations

import os
from pathlib import Path

from batchnorm import records
from batchnorm.report import figures
from batchnorm.report.contents import gather
from batchnorm.report.page import Progress, shown
from batchnorm.report.page import render as render


def build(run: Path, progress: Progress = list) -> Path:
    """Write the figures and report.html of the run in folder `run`; return the path of report.html.

    progress: goes through the charts, which take a while to draw, and may show how many are done.

    Raises: RecordError when the folder does not exist, or its records are missing or invalid.
    """
    if run.is_file():
        raise records.RecordError(
            f"{run} is not the folder of a run: it is a file, name its folder {run.parent}"
        )
    if not run.is_dir():
        raise records.RecordError(f"{run} is not the folder of a run: there is no such folder")
    file = run / "records.jsonl"
    if not file.exists():
        raise records.RecordError(f"{run} is not the folder of a run: it has no {file.name}")
    lines = list(records.read(file))
    if not lines:
        raise records.RecordError(f"{file} holds no records")
    try:
        contents = gather(lines)
        page = render(lines, progress)
    except records.RecordError as error:
        raise records.RecordError(f"{file}: {error}") from None
    (run / "figures").mkdir(exist_ok=True)
    for chart in progress(shown(contents)):
        _replace(run / "figures" / f"{chart.name}.png", figures.png(chart))
        _replace(run / "figures" / f"{chart.name}.svg", figures.svg(chart).encode())
    _replace(run / "report.html", page.encode())
    return run / "report.html"


def _replace(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(content)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
