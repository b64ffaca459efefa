"""When a run is evaluated."""

from __future__ import annotations

from collections.abc import Iterator

_GAPS = (10, 20, 50, 100, 200, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000)


def evaluation_steps(steps: int, apart: float = 0.1) -> Iterator[int]:
    """Where a run of `steps` steps is evaluated: every 10 steps, later at most this share `apart`, and at the end."""
    step = 0
    while step < steps:
        step += max(gap for gap in _GAPS if gap <= max(10, step * apart))
        yield min(step, steps)
