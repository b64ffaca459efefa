"""A case: what is measured in one go, and how its contenders are brought up."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from batchnorm.bench.rounds import Contender, Sample, interleave, times
from batchnorm.bench.rows import Processes, Row

FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}


@dataclass
class Contest:
    """The contenders of a case; `calls` are in a sample, `notes` say who could not take part."""

    calls: int
    contenders: dict[str, Contender] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def admit_compiled(self, contender: Contender) -> None:
        """Let torch.compile take part unless it fails, which it does in as many ways as there are toolchains."""
        try:
            contender()
        except Exception as error:
            self.notes.append(f"torch.compile failed with {type(error).__name__}")
        else:
            self.contenders["compile"] = contender


@dataclass(frozen=True)
class Case:
    """One or more rows of a table; `prepare` builds the contenders, which are gone when it is left."""

    name: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    parts: tuple[str, ...]
    prepare: Callable[[], AbstractContextManager[Contest]]
    processes: Processes | None = None

    @property
    def title(self) -> str:
        """The case in a few words."""
        return f"{self.name} {sizes(self.shape)} {self.layout} {self.dtype}"

    def measure(self, seconds: float, least: int) -> tuple[list[Row], list[str]]:
        """The rows of this case, and notes."""
        with self.prepare() as contest:
            rounds = interleave(contest.contenders, seconds, least)
        rows = [
            Row(
                name=self.name,
                shape=self.shape,
                layout=self.layout,
                dtype=self.dtype,
                part=part,
                calls=contest.calls,
                rounds=len(rounds),
                processes=self.processes,
                times=times(rounds, part),
            )
            for part in self.parts
        ]
        return rows, [f"{self.title}: {note}" for note in contest.notes]


def timed(part: str, call: Callable[[], object], calls: int) -> Contender:
    """A contender that calls `call` so many times for a sample."""

    def sample() -> Sample:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return {part: (time.perf_counter() - start) / calls}

    return sample


def compiled(call: Any) -> Any:
    """`call`, a module or a function, as torch.compile makes it for shapes that do not change."""
    torch._dynamo.reset()  # or it would give up after so many shapes of the same code
    return torch.compile(call, dynamic=False)


def sizes(shape: tuple[int, ...]) -> str:
    """A shape in words: 32×64×56×56."""
    return "×".join(map(str, shape))
