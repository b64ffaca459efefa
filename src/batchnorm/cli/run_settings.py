"""An experiment's settings: from the options of a new run, or from the records of a run to resume."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from batchnorm.cli.terminal import RUNS, Failure, from_options, option

if TYPE_CHECKING:
    from batchnorm.experiments.claim import Settings

    S = TypeVar("S", bound=Settings)


def new_run_settings(folder: Path, kind: type[S], claim_names: Collection[str], chosen: dict[str, Any]) -> S:
    """The settings of a new run in `folder`, with the `chosen` values and defaults for the rest."""
    if (folder / "records.jsonl").exists():
        raise Failure(f"{folder} holds a run already: add --resume to resume it, or choose another --out")
    unknown = set(chosen.get("claims", ())) - set(claim_names)
    if unknown:
        names = ", ".join(claim_names)
        raise Failure(f"no claim {', '.join(sorted(unknown))}: choose from {names}, or all")
    return from_options(kind, chosen)


def resumed_run_settings(folder: Path, experiment: str, kind: type[S], chosen: dict[str, Any]) -> S:
    """The settings of the run of an experiment in `folder`; `chosen` values must be equal to them."""
    from pydantic import ValidationError

    from batchnorm.records import Run, read

    path = folder / "records.jsonl"
    head = next(read(path), None)
    if not isinstance(head, Run):
        raise Failure(f"{path} does not begin with a run record: it is not a run that can be resumed")
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
        raise Failure(f"{options} cannot change when a run is resumed; leave it out, or start a new run")
    return settings


def newest_run(kind: str) -> Path:
    """The folder of the newest incomplete run of a kind, or else of the newest run in runs/.

    Incomplete ones are looked for in the folders here and in those in them, which is where --out has put most.
    """
    found = [path for pattern in ("*", "*/*") for path in Path().glob(f"{pattern}/records.jsonl")]
    runs = sorted((path for path in found if _kind(path) == kind), key=lambda path: -path.stat().st_mtime)
    usual = (path for path in runs if path.parent.parent == RUNS)
    chosen = next((path for path in runs if not _complete(path)), None) or next(usual, None)
    if chosen is None:
        raise Failure(
            f"no {kind} run to resume in {RUNS}/, and no stopped one in another folder here: name its folder, as in "
            "--out FOLDER --resume"
        )
    return chosen.parent


def _kind(path: Path) -> str:
    """The experiment of the run with these records; empty if they are none."""
    from batchnorm.records import RecordError, Run, read

    try:
        head = next(read(path), None)
    except RecordError:
        return ""
    return head.experiment if isinstance(head, Run) else ""


def _complete(path: Path) -> bool:
    """Whether a run has ended: its last record is a result, or a verdict that is not "incomplete"."""
    from batchnorm.records import RecordError, Result, Verdict, read

    try:
        *_, last = read(path)
    except (RecordError, ValueError):  # broken, or empty
        return False
    return isinstance(last, Result) or (isinstance(last, Verdict) and last.outcome != "incomplete")
