"""When a run is evaluated."""

from __future__ import annotations

from collections.abc import Iterator


def evaluation_steps(steps: int) -> Iterator[int]:
    """Where a run of `steps` steps is evaluated: every 10 steps, from 200 on at most 10 % apart, and at the end."""
    step = 0
    while step < steps:
        step += max(gap for gap in (10, 20, 50, 100, 200, 500, 1000, 2500) if gap <= max(10, step // 10))
        yield min(step, steps)
