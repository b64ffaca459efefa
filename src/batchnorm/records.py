"""What a run writes and a report reads: one typed JSON object a line, only ever appended.

    run         once, first: the command, the full configuration, the seeds, the versions, the machine
    evaluation  one network, part-way: loss, accuracy, the distribution seen by a sigmoid
    result      one network, at its end
    chart       a figure as data: whoever draws it needs nothing else
    verdict     a claim of the paper, what was measured, and whether it was seen

A chart or verdict that is written again, after a run was continued, replaces the earlier one of its name.
Knows nothing of torch: a page can be rebuilt from these lines years later.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, model_validator

SCHEMA = 1
Role = Literal["bn", "plain", "other"]


class RecordError(Exception):
    """A record file that is missing or cannot be understood; the message says which line and why."""


class _Record(BaseModel):
    # JSON has no inf or nan: they travel as the strings "Infinity" and "NaN"
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Run(_Record):
    """The head of the file: everything that is needed to run it again."""

    kind: Literal["run"] = "run"
    schema_version: int = SCHEMA
    experiment: str
    title: str
    command: str
    config: dict[str, JsonValue]
    seeds: list[int]
    versions: dict[str, str]
    machine: str
    data: str = Field("", description="the data set in words: name, numbers and sizes of its images")
    started: str = Field(description="ISO 8601, UTC")


class Evaluation(_Record):
    """One network after `step` training steps."""

    kind: Literal["evaluation"] = "evaluation"
    job: str = Field(description="the network's name within the run")
    step: int
    loss: float = Field(description="training loss, nats, mean since the evaluation before")
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
    """One network at its end."""

    kind: Literal["result"] = "result"
    job: str
    config: dict[str, JsonValue]
    steps: int = Field(
        description="steps taken; fewer than asked for when it diverged or ran out of patience"
    )
    diverged: bool = Field(description="the loss became inf or nan")
    loss: float
    accuracy: float
    accuracy_moving: float | None = None
    train_accuracy: float | None = None
    unreadable: int = Field(0, description="images of either set that could not be read")
    seconds: float


class Line(_Record):
    """One line of a chart: y against x, with an optional band from `low` to `high`."""

    label: str
    role: Role = Field(description="which network it is, for the colour")
    x: list[float]
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

    title: str
    x_label: str
    y_label: str
    x_log: bool = False
    y_range: tuple[float, float] | None = None
    y_percent: bool = False
    lines: list[Line]


class Chart(_Record):
    """A figure as data; panels stand side by side."""

    kind: Literal["chart"] = "chart"
    claim: str
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="the file name of the picture, without its ending",
    )
    title: str
    caption: str
    panels: list[Panel]


class Table(_Record):
    """Rows of text under a header; the first column names the row."""

    columns: list[str]
    rows: list[list[str]]
    note: str = ""


class Verdict(_Record):
    """A claim of the paper, what was expected, what was measured, and whether the claim was seen."""

    kind: Literal["verdict"] = "verdict"
    claim: str = Field(description="a short name, e.g. 'figure-1'")
    title: str = Field(description="the claim in one sentence")
    source: str = Field(description="where in the paper")
    expected: str = Field(description="the band that counts as seen")
    measured: str = Field(description="what was measured, one or two sentences")
    outcome: Literal["seen", "not seen here", "incomplete"]
    choices: list[str] = Field(default=[], description="what the paper leaves open and we chose")
    tables: dict[str, Table] = Field(default={}, description="by title")
    steps_ratio: dict[str, float] | None = Field(
        None,
        description="by test accuracy in per cent: steps without BN ÷ steps with BN, at the same learning rate, "
        "mean over seeds; accuracies that some network did not reach are absent",
    )


Record = Annotated[Run | Evaluation | Result | Chart | Verdict, Field(discriminator="kind")]
_RECORD: TypeAdapter[Run | Evaluation | Result | Chart | Verdict] = TypeAdapter(Record)


class RecordFile:
    """A record file open for appending, a context manager. A line cut off by a crash is dropped on opening.

    An evaluation or result that is in the file already is not written again, so a network may be
    replayed from a checkpoint that is older than its last line; nor is a chart that is the same.
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
        if isinstance(record, Evaluation | Result) and before is not None:
            return False
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
        """Two processes that write one file would write everything twice. Released when the file is closed."""
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
    """The records of a file, in order. A last line without its end, cut off by a crash, is passed over.

    Raises: RecordError when there is no such file or a line is not a record.
    """
    try:
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
    """What a record is about; of two that are about the same, the later one counts."""
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
