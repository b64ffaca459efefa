"""Findings as files: a page, SARIF, JSON, GitHub's annotations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from batchnorm.atomic_file import replacing
from batchnorm.requirements import install_command

if TYPE_CHECKING:
    from batchnorm.diagnostics.finding import Findings
    from batchnorm.diagnostics.shift import Shift as Look

Format = Literal["html", "json", "sarif", "github"]
SUFFIXES: dict[str, Format] = {".html": "html", ".json": "json", ".sarif": "sarif", ".txt": "github"}


def save(found: Findings, path: Path, title: str, shifts: Sequence[Look] = (), command: str = "") -> None:
    """Write a file of the kind that its suffix says. Raises: ValueError for another suffix."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the suffix says what is written: {', '.join(SUFFIXES)}")
    text = written(found, SUFFIXES[path.suffix], title, shifts, command)
    with replacing(path) as unfinished:
        unfinished.write_text(text)


def written(found: Findings, kind: Format, title: str, shifts: Sequence[Look] = (), command: str = "") -> str:
    """The text of such a file. Raises: ImportError, with what is to be installed, for a page without jinja2."""
    from batchnorm.diagnostics.check import checks

    if kind == "json":
        return json.dumps({"model": title, **found.as_dict()}, indent=2)
    try:
        from batchnorm.report.annotations import github
        from batchnorm.report.doctor_page import render
        from batchnorm.report.examined import Examined, Explained, Shift
        from batchnorm.report.sarif import sarif
    except ImportError as error:
        raise ImportError(f"{error}: {install_command('cli')}") from None
    shown = {each.code for each in found} | {each.finding.code for each in found.fixed} | found.skipped.keys()
    told = Examined.of(
        title,
        found.as_dict(),
        checks={
            each.code: Explained(each.name, each.severity, each.symptom, each.why, each.source)
            for each in checks()
            if each.code in shown
        },
        shift=_by_layer(shifts, Shift),
        command=command,
        versions=_versions(),
        date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S+00:00}",
    )
    if kind == "sarif":
        return json.dumps(sarif(told, _versions().get("batchnorm", "")), indent=2)
    return github(told) if kind == "github" else render(told)


def _by_layer(shifts: Sequence[Look], made: Callable[..., Any]) -> list[Any]:
    layers: dict[str, list[Look]] = {}
    for each in shifts:
        layers.setdefault(each.layer, []).append(each)
    return [
        made(
            layer,
            [each.step for each in looks],
            *([each.percentiles[number] for each in looks] for number in range(3)),
            [float("nan") if each.mean_drift is None else each.mean_drift for each in looks],
        )
        for layer, looks in layers.items()
    ]


def _versions() -> dict[str, str]:
    found = {}
    for name in ("batchnorm", "torch", "torchvision", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
