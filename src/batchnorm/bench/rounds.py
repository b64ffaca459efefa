"""Interleaved measurement of candidates, and the statistics of their times.

The speed of a machine drifts with its clock and its load, which biases a comparison of candidates measured one after
the other. Here each round measures every candidate once, ratios are taken within a round, and the result is their
median.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from batchnorm.bench.rows import Time

Sample = dict[str, float]  # seconds per call of each part, such as forward and backward
Candidate = Callable[[], Sample]
Round = dict[str, Sample]  # by candidate

_WARM_UP = 2  # rounds that are discarded: memory is allocated, instruction caches are filled


def interleave(
    candidates: Mapping[str, Candidate],
    seconds: float,
    least: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Round]:
    """Rounds of all `candidates`: at least `least`, and as many as fit into `seconds`.

    The order rotates from round to round, since the state of the caches depends on the previous candidate.
    """
    rounds: list[Round] = []
    with _no_collection():
        for number in range(_WARM_UP):
            _round(candidates, number)
        start = clock()
        while len(rounds) < least or clock() - start < seconds:
            rounds.append(_round(candidates, len(rounds)))
    return rounds


def _round(candidates: Mapping[str, Candidate], number: int) -> Round:
    names = list(candidates)
    first = number % len(names)
    return {name: candidates[name]() for name in names[first:] + names[:first]}


def times(rounds: Sequence[Round], part: str) -> dict[str, Time]:
    """The time of each candidate for `part`, or for all its parts together if it has no part of that name."""
    seconds_by_name = {name: [_seconds(round[name], part) for round in rounds] for name in rounds[0]}
    return {
        name: _time(seconds, seconds_by_name.get("copy"), seconds_by_name.get("ours"))
        for name, seconds in seconds_by_name.items()
    }


def _seconds(sample: Sample, part: str) -> float:
    return sample[part] if part in sample else sum(sample.values())


def _time(seconds: list[float], copy: list[float] | None, ours: list[float] | None) -> Time:
    lower, median, upper = quartiles([1e3 * seconds for seconds in seconds])
    over = quartiles(_ratios(seconds, ours)) if ours else (None, None, None)
    return Time(
        ms=median,
        low=lower,
        high=upper,
        copies=statistics.median(_ratios(seconds, copy)) if copy else None,
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
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable Python's garbage collector, which would add to the time of some candidate."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
