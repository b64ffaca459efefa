"""The steps at which a run is evaluated."""

from __future__ import annotations

from collections.abc import Iterator

_GAPS = (10, 20, 50, 100, 200, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000)


class Due:
    """Whether a step is one of `steps`, which increase; asked for steps that do. Computes no further than that."""

    def __init__(self, steps: Iterator[int]) -> None:
        self._steps, self._next = steps, next(steps, None)

    def __contains__(self, step: int) -> bool:
        while self._next is not None and self._next < step:
            self._next = next(self._steps, None)
        return self._next == step


def evaluation_steps(steps: int, apart: float = 0.1) -> Iterator[int]:
    """The evaluated steps of a run of `steps` steps: every 10, later every `apart`·step at most, and the last."""
    step = 0
    while step < steps:
        step += max(gap for gap in _GAPS if gap <= max(10, step * apart))
        yield min(step, steps)
