"""What was measured, as values: a `Row` is a line of a table, and `Measured` the file that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from batchnorm.bench.options import Options

SCHEMA = 1

Command = Literal["kernels", "step", "infer", "statistics", "scaling"]
COMMANDS: tuple[Command, ...] = ("kernels", "step", "infer", "statistics", "scaling")


class ResultsError(Exception):
    """A file of results that cannot be understood; the message says which and why."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Time(_Value):
    """How long one contender took."""

    ms: float = Field(description="median over the rounds, milliseconds a call")
    low: float = Field(description="lower quartile of the same")
    high: float = Field(description="upper quartile of the same")
    copies: float | None = Field(None, description="time / time of a copy, median over the rounds")
    over_ours: float | None = Field(None, description="time / our time, median over the rounds")
    over_ours_low: float | None = Field(None, description="lower quartile of the same")
    over_ours_high: float | None = Field(None, description="upper quartile of the same")


class Processes(_Value):
    """So many, of one thread each, on a machine of so many cores."""

    count: int
    cores: int

    @property
    def share(self) -> float:
        """How much of a core each has."""
        return min(self.count, self.cores) / self.count


class Row(_Value):
    """One thing that every contender did, in turns with the others."""

    name: str = Field(description="the operation, or the network")
    shape: tuple[int, ...] = Field(description="of the input")
    layout: str = Field(
        description="NCHW, channels-last, (N, C); 'own settings' where each contender has its own"
    )
    dtype: str
    part: str = Field(description="forward, backward, both; step; evaluation")
    calls: int = Field(description="a sample is the mean of so many calls")
    rounds: int
    processes: Processes | None = Field(None, description="in step, where the row is about their number")
    times: dict[str, Time] = Field(description="by contender: ours, torch, copy, plain and so on")


class Measured(_Value):
    """What one command measured: everything that its tables and its picture need."""

    schema_version: int = SCHEMA
    command: Command
    line: str = Field(description="the command line")
    options: Options
    threads: int
    machine: str
    versions: dict[str, str]
    environment: dict[str, str] = Field(description="variables that change what is measured")
    kept_memory: bool = Field(description="whether freed memory stayed with the process")
    started: str = Field(description="ISO 8601, UTC")
    finished: bool = Field(description="False when it was stopped before the last row")
    notes: list[str] = Field(description="who could not take part, and why")
    rows: list[Row]


def read(path: Path) -> Measured:
    """The results in a file.

    Raises: ResultsError when it cannot be read or holds something else.
    """
    try:
        return Measured.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ResultsError(f"{path} holds no results of this version: {where}: {first['msg']}") from None
