"""A case: one comparison of candidates, and how they are built."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from batchnorm.bench.rounds import Candidate, Sample, interleave, times
from batchnorm.bench.rows import Memory, Processes, Row

FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}


@dataclass
class Comparison:
    """The candidates of a case. A sample is the mean of `calls` calls; `notes` name candidates that are missing."""

    calls: int
    candidates: dict[str, Candidate] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add_compiled(self, candidate: Candidate) -> None:
        """Add the candidate "compile", or a note if torch.compile fails, which depends on the toolchain."""
        try:
            candidate()
        except Exception as error:
            self.notes.append(f"torch.compile failed with {type(error).__name__}")
        else:
            self.candidates["compile"] = candidate


@dataclass(frozen=True)
class Case:
    """One or more rows of a table; the context `prepare` builds the candidates and frees them at its end."""

    name: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    parts: tuple[str, ...]
    prepare: Callable[[], AbstractContextManager[Comparison]]
    processes: Processes | None = None

    @property
    def title(self) -> str:
        """Name, shape, layout and dtype."""
        return f"{self.name} {sizes(self.shape)} {self.layout} {self.dtype}"

    def measure(self, seconds: float, least: int) -> tuple[list[Row], list[str]]:
        """Measure; return the rows, one per part, and the notes."""
        with self.prepare() as comparison:
            rounds = interleave(comparison.candidates, seconds, least)
        rows = [
            Row(
                name=self.name,
                shape=self.shape,
                layout=self.layout,
                dtype=self.dtype,
                part=part,
                calls=comparison.calls,
                rounds=len(rounds),
                processes=self.processes,
                times=times(rounds, part),
                memory=comparison.memory or None,
            )
            for part in self.parts
        ]
        return rows, [f"{self.title}: {note}" for note in comparison.notes]


def time_calls(part: str, call: Callable[[], object], calls: int) -> Candidate:
    """A candidate whose sample is the mean time of `calls` calls."""

    def sample() -> Sample:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return {part: (time.perf_counter() - start) / calls}

    return sample


def compile_static(call: Any) -> Any:
    """`call`, a module or a function, compiled by torch.compile for static shapes."""
    torch._dynamo.reset()  # otherwise it reaches its recompile limit
    return torch.compile(call, dynamic=False)


def sizes(shape: tuple[int, ...]) -> str:
    """A shape as text: 32×64×56×56."""
    return "×".join(map(str, shape))
