"""An experiment's settings: chosen for a new run, or read from the run that is continued."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from batchnorm.cli.terminal import RUNS, Failure, from_options, option

if TYPE_CHECKING:
    from batchnorm.experiments.claim import Settings

    S = TypeVar("S", bound=Settings)


def chosen_for(folder: Path, kind: type[S], claim_names: Collection[str], chosen: dict[str, Any]) -> S:
    """Those of a new run in `folder`; what was not chosen takes its default."""
    if (folder / "records.jsonl").exists():
        raise Failure(f"{folder} holds a run already: add --resume to go on with it, or choose another --out")
    unknown = set(chosen.get("claims", ())) - set(claim_names)
    if unknown:
        names = ", ".join(claim_names)
        raise Failure(f"no claim {', '.join(sorted(unknown))}: choose from {names}, or all")
    return from_options(kind, chosen)


def read_from(folder: Path, experiment: str, kind: type[S], chosen: dict[str, Any]) -> S:
    """Those of the run of an experiment in `folder`, with which what was chosen must agree."""
    from pydantic import ValidationError

    from batchnorm.records import Run, read

    path = folder / "records.jsonl"
    head = next(read(path), None)
    if not isinstance(head, Run):
        raise Failure(f"{path} does not begin with a run record: it is not a run that can be continued")
    if head.experiment != experiment:
        raise Failure(f"{folder} holds a run of {head.experiment}: name a folder of {experiment} with --out")
    try:
        settings = kind.model_validate(head.config)
    except ValidationError as error:
        raise Failure(
            f"{path} was written by another version: {error.errors()[0]['msg']}; start a new run"
        ) from None
    changed = [name for name, value in chosen.items() if getattr(settings, name) != value]
    if changed:
        options = ", ".join(map(option, changed))
        raise Failure(f"{options} cannot change when a run is continued; leave it out, or start a new run")
    return settings


def newest_run(kind: str) -> Path:
    """The folder of the newest run of a kind that was stopped, or of the newest one."""
    runs = sorted(RUNS.glob(f"{kind}-*/records.jsonl"), key=lambda path: -path.stat().st_mtime)
    if not runs:
        raise Failure(f"no {kind} run to continue in {RUNS}/: name its folder with --out")
    return next((path for path in runs if not _complete(path)), runs[0]).parent


def _complete(path: Path) -> bool:
    """Whether a run came to its end: its last record is a result, or a verdict and not that it is incomplete."""
    from batchnorm.records import RecordError, Result, Verdict, read

    try:
        *_, last = read(path)
    except (RecordError, ValueError):  # broken, or empty
        return False
    return isinstance(last, Result) or (isinstance(last, Verdict) and last.outcome != "incomplete")
