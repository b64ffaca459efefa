"""The results as data: a `Row` is a row of a table, `Measured` is the file of a command."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from batchnorm.bench.options import Options

SCHEMA = 1

Command = Literal["kernels", "step", "memory", "infer", "fold", "statistics", "scaling"]
COMMANDS: tuple[Command, ...] = ("kernels", "step", "memory", "infer", "fold", "statistics", "scaling")


class ResultsError(Exception):
    """An invalid file of results; the message says which and why."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Time(_Value):
    """The time of one candidate."""

    ms: float = Field(description="median over the rounds, milliseconds a call")
    low: float = Field(description="lower quartile of the same")
    high: float = Field(description="upper quartile of the same")
    copies: float | None = Field(None, description="time / time of a copy, median over the rounds")
    over_ours: float | None = Field(None, description="time / our time, median over the rounds")
    over_ours_low: float | None = Field(None, description="lower quartile of the same")
    over_ours_high: float | None = Field(None, description="upper quartile of the same")


class Memory(_Value):
    """The memory of a training step of one candidate, in megabytes (10⁶ bytes) beyond its weights."""

    peak: float = Field(description="the most that is allocated at once, beyond the gradients of weights too")
    saved: float = Field(description="what the forward pass saves for the backward pass")


class Processes(_Value):
    """The number of processes, of one thread each, and of cores of the machine."""

    count: int
    cores: int

    @property
    def share(self) -> float:
        """Cores per process, at most 1."""
        return min(self.count, self.cores) / self.count


class Row(_Value):
    """The times of all candidates in one comparison."""

    name: str = Field(description="the operation, or the network")
    shape: tuple[int, ...] = Field(description="of the input")
    layout: str = Field(
        description="NCHW, channels-last or (N, C); 'own settings' if each candidate has its own"
    )
    dtype: str
    part: str = Field(description="forward, backward, both; step; evaluation")
    calls: int = Field(description="calls per sample; a sample is their mean")
    rounds: int
    processes: Processes | None = Field(None, description="of the rows of the command scaling")
    times: dict[str, Time] = Field(description="by candidate: ours, torch, copy, plain and so on")
    memory: dict[str, Memory] | None = Field(
        None, description="by candidate, of the rows of the command memory"
    )


class Measured(_Value):
    """The results of one command: all data of its tables and its figure."""

    schema_version: int = SCHEMA
    command: Command
    line: str = Field(description="the command line")
    options: Options
    threads: int
    machine: str
    versions: dict[str, str]
    environment: dict[str, str] = Field(description="environment variables that affect measurements")
    kept_memory: bool = Field(description="whether the process kept freed memory")
    started: str = Field(description="ISO 8601, UTC")
    finished: bool = Field(description="False if it was stopped before the last row")
    notes: list[str] = Field(description="which candidates are missing, and why")
    rows: list[Row]


def read(path: Path) -> Measured:
    """The results in a file.

    Raises: ResultsError when it cannot be read or is not a file of results.
    """
    try:
        return Measured.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ResultsError(f"{path} holds no results of this version: {where}: {first['msg']}") from None
