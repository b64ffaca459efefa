"""Contenders that take turns, and the arithmetic of what they took.

A machine drifts: its clock, its other users. Contenders measured one after the other would be compared across that
drift. Here every round times each of them once, a ratio is taken within a round, and the result is the median of these.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from batchnorm.bench.rows import Time

Sample = dict[str, float]  # seconds a call, of each part: forward and backward, say
Contender = Callable[[], Sample]
Round = dict[str, Sample]  # by contender

_WARM_UP = 2  # rounds that do not count: memory is asked for, caches of code are filled


def interleave(
    contenders: Mapping[str, Contender],
    seconds: float,
    least: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Round]:
    """Rounds of all `contenders`: at least `least`, and as many as fit into `seconds`.

    Each round begins with another contender, for whoever comes first may find the caches in another state.
    """
    rounds: list[Round] = []
    with _no_collection():
        for number in range(_WARM_UP):
            _round(contenders, number)
        start = clock()
        while len(rounds) < least or clock() - start < seconds:
            rounds.append(_round(contenders, len(rounds)))
    return rounds


def _round(contenders: Mapping[str, Contender], number: int) -> Round:
    names = list(contenders)
    first = number % len(names)
    return {name: contenders[name]() for name in names[first:] + names[:first]}


def times(rounds: Sequence[Round], part: str) -> dict[str, Time]:
    """What each contender took for `part`; for all its parts together where it has none of that name."""
    taken = {name: [_seconds(round[name], part) for round in rounds] for name in rounds[0]}
    return {name: _time(own, taken.get("copy"), taken.get("ours")) for name, own in taken.items()}


def _seconds(sample: Sample, part: str) -> float:
    return sample[part] if part in sample else sum(sample.values())


def _time(own: list[float], copy: list[float] | None, ours: list[float] | None) -> Time:
    low, middle, high = quartiles([1e3 * seconds for seconds in own])
    over = quartiles(_ratios(own, ours)) if ours else (None, None, None)
    return Time(
        ms=middle,
        low=low,
        high=high,
        copies=statistics.median(_ratios(own, copy)) if copy else None,
        over_ours=over[1],
        over_ours_low=over[0],
        over_ours_high=over[2],
    )


def _ratios(one: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile, by linear interpolation."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's garbage collector, which would run in somebody's turn."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
