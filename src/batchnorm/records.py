"""The records of a run: an append-only JSONL file with one typed object per line.

    run         once, first: the command, the full configuration, the seeds, the versions, the machine
    evaluation  of one network during training: loss, accuracy, percentiles of the input to a sigmoid
    result      of one network at its end
    chart       the data of a figure
    verdict     a claim of the paper, what was measured, and whether it was seen

A chart or verdict that is written again by a resumed run replaces the earlier one of the same name.
Does not import torch, so that a report can be rebuilt from the file years later.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    model_validator,
)

SCHEMA = 1
Role = Literal["bn", "plain", "other"]


# What a page can show and a step can count: records from elsewhere may hold anything.
def _printable(value: object) -> object:
    """A text as UTF-8 can hold it: a file's name may have other bytes."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


Text = Annotated[str, Field(max_length=10_000), BeforeValidator(_printable)]
Label = Annotated[str, Field(max_length=300), BeforeValidator(_printable)]
Step = Annotated[int, Field(ge=0, le=10**15)]
Class = Annotated[int, Field(ge=0, lt=10**7)]
_POINTS, _LINES, _PANELS, _ROWS = 10**6, 60, 12, 5_000
_LARGEST = 256 * 2**20  # bytes of a file


class RecordError(Exception):
    """A record file that is missing or invalid; the message says which line and why."""


class _Record(BaseModel):
    # JSON has no inf or nan: they are written as the strings "Infinity" and "NaN"
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Run(_Record):
    """The first record of the file: everything needed to repeat the run."""

    kind: Literal["run"] = "run"
    schema_version: int = SCHEMA
    experiment: Label
    title: Text
    command: Text
    config: dict[str, JsonValue]
    seeds: list[int]
    versions: dict[str, str]
    machine: Text
    data: Text = Field("", description="the data set: name, numbers and sizes of its images")
    classes: list[Label] = Field([], description="the names of its classes, in the order of their numbers")
    started: Label = Field(description="ISO 8601, UTC")


class Evaluation(_Record):
    """The evaluation of one network after `step` training steps."""

    kind: Literal["evaluation"] = "evaluation"
    job: Label = Field(description="the network's name within the run")
    step: Step
    loss: float = Field(description="training loss, nats, mean since the previous evaluation")
    accuracy: float = Field(
        description="on the test set, 0 to 1; with BN by Algorithm 2's population statistics"
    )
    accuracy_moving: float | None = Field(None, description="with BN: by the moving averages instead")
    accuracy_top5: float | None = Field(
        None, description="the share of images whose class is among the five likeliest"
    )
    accuracy_average: float | None = Field(
        None, description="of the average of the weights, its population statistics estimated anew"
    )
    loss_validation: float | None = Field(None, description="mean over the validation set, nats")
    rate: float | None = Field(None, description="learning rate of the next step")
    confusion: list[tuple[Class, Annotated[int, Field(ge=-1, lt=10**7)], Step]] | None = Field(
        None,
        max_length=200_000,
        description="(class, likeliest class, images) wherever there are any, of a new best accuracy; with more than "
        "100 classes the likeliest is the class itself, or -1 for any other",
    )
    percentiles: tuple[float, float, float] | None = Field(
        None,
        description="15th, 50th, 85th of the input to one sigmoid of the last hidden layer on the test set",
    )
    travel: float | None = Field(
        None,
        description="how far the inputs to the last hidden layer's sigmoids have moved so far: the path of the "
        "median over the evaluations, in units of its mean 15-85 width, averaged over the sigmoids",
    )


class Result(_Record):
    """The final result of one network."""

    kind: Literal["result"] = "result"
    job: Label
    config: dict[str, JsonValue]
    steps: Step = Field(
        description="steps taken; fewer than configured if it diverged or was stopped early by `patience`"
    )
    diverged: bool = Field(description="the loss became inf or nan")
    loss: float
    accuracy: float
    accuracy_moving: float | None = None
    train_accuracy: float | None = None
    unreadable: int = Field(0, description="images of both sets that could not be read")
    unreadable_images: list[Text] = Field([], max_length=100, description="the names of the first of them")
    seconds: float


class Line(_Record):
    """One line of a chart: y against x, with an optional band from `low` to `high`."""

    label: Label
    role: Role = Field(description="which network it is, for the colour")
    x: list[float] = Field(max_length=_POINTS)
    y: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None
    dashed: bool = False
    markers: bool = False

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        for name, values in (("y", self.y), ("low", self.low), ("high", self.high)):
            if values is not None and len(values) != len(self.x):
                raise ValueError(f"{name} has {len(values)} values, x has {len(self.x)}")
        return self


class Panel(_Record):
    """One pair of axes of a chart."""

    title: Label
    x_label: Label
    y_label: Label
    x_log: bool = False
    y_range: tuple[float, float] | None = None
    y_percent: bool = False
    lines: list[Line] = Field(max_length=_LINES)


class Chart(_Record):
    """The data of a figure; its panels are drawn side by side."""

    kind: Literal["chart"] = "chart"
    claim: Label
    name: str = Field(
        max_length=100,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="the file name of the figure, without its extension",
    )
    title: Text
    caption: Text
    panels: list[Panel] = Field(max_length=_PANELS)


class Table(_Record):
    """Rows of text under a header; the first column names the row."""

    columns: list[Label] = Field(max_length=100)
    rows: list[list[Text]] = Field(max_length=_ROWS)
    note: Text = ""


class Verdict(_Record):
    """A claim of the paper, what was expected, what was measured, and whether the claim was seen."""

    kind: Literal["verdict"] = "verdict"
    claim: Label = Field(description="a short name, e.g. 'figure-1'")
    title: Text = Field(description="the claim in one sentence")
    source: Text = Field(description="where in the paper")
    expected: Text = Field(description="the band that counts as seen")
    measured: Text = Field(description="what was measured, one or two sentences")
    outcome: Literal["seen", "not seen here", "incomplete"]
    choices: list[str] = Field(default=[], description="our choices where the paper leaves them open")
    tables: dict[str, Table] = Field(default={}, description="by title")
    steps_ratio: dict[str, float] | None = Field(
        None,
        description="by test accuracy in per cent: steps without BN ÷ steps with BN, at the same learning rate, "
        "mean over seeds; accuracies that some network did not reach are absent",
    )


Record = Annotated[Run | Evaluation | Result | Chart | Verdict, Field(discriminator="kind")]
_RECORD: TypeAdapter[Run | Evaluation | Result | Chart | Verdict] = TypeAdapter(Record)


class RecordFile:
    """A record file open for appending, a context manager. An incomplete last line is dropped on opening.

    An evaluation or result that is in the file already is not written again, so a network may resume
    from a checkpoint that is older than its last line. An identical chart is not written again either.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        try:
            self._lock()
            self._drop_torn_line()
            self.records = list(read(path))
        except BaseException:
            self._file.close()
            raise
        self._last = {_identity(record): record for record in self.records}

    def append(self, record: Record) -> bool:
        """Write `record` and flush it; return whether it was new."""
        identity = _identity(record)
        before = self._last.get(identity)
        if isinstance(record, Evaluation) and before is not None:
            return False
        if isinstance(record, Result) and isinstance(before, Result) and record.steps <= before.steps:
            return False  # but a run that is made longer has another end
        if isinstance(record, Chart) and record == before:
            return False
        self._file.write(record.model_dump_json() + "\n")
        self._file.flush()
        self._last[identity] = record
        self.records.append(record)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:  # closed even when the disk is full
            self._file.flush()
            os.fsync(self._file.fileno())

    def _lock(self) -> None:
        """Lock the file, so that no two processes write it. The lock is released when the file is closed."""
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecordError(f"{self.path} is being written by another process") from None

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))


def read(path: Path) -> Iterator[Record]:
    """The records of a file, in order. An incomplete last line is ignored.

    Raises: RecordError when the file cannot be read or a line is not a record.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise RecordError(f"{path} has more than {_LARGEST >> 20} MB, which no run writes")
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = _RECORD.validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RecordError(
                f"{path}, line {number}: {where + ': ' if where else ''}{first['msg']}"
            ) from None
        if isinstance(record, Run) and record.schema_version > SCHEMA:
            raise RecordError(
                f"{path} was written by a newer version of batchnorm: update it to read this run"
            )
        yield record


def _identity(record: Record) -> tuple[object, ...]:
    """The key of a record; of two records with the same key the later one counts."""
    match record:
        case Run():
            return ("run",)
        case Evaluation():
            return ("evaluation", record.job, record.step)
        case Result():
            return ("result", record.job)
        case Chart():
            return ("chart", record.name)
        case Verdict():
            return ("verdict", record.claim)
