"""What Sync must cost a step, from nothing but the time of collectives by themselves: latency and bandwidth.

    time of a collective = latency + bytes that reach a rank / bandwidth

for so many ranks and either collective, by two sizes of it; Sync's of a step one after the other, for each layer waits
for its own. The collectives are timed between computations, so that a latency has the waking of ranks that slept in
it. What Sync computes besides, and that layers differ in what lies between, are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from batchnorm.bench.rows import Row
from batchnorm.bench.traffic import Collective, Name

SMALL, LARGE = 8, 2**20  # bytes of a rank's tensor: a number, and more than any layer has

_KINDS: tuple[Name, ...] = ("all_gather", "all_reduce")

# By the name of the contender in a row.
BARE = {f"{kind}, {size:,} bytes": Collective(kind, size) for kind in _KINDS for size in (SMALL, LARGE)}


class Link(NamedTuple):
    """What one collective is like among so many ranks, two or more."""

    latency: float  # milliseconds
    bandwidth: float  # bytes that reach a rank in a millisecond

    def ms(self, received: float) -> float:
        """Of one collective that brings a rank so many bytes."""
        return self.latency + received / self.bandwidth


def links(row: Row) -> dict[Name, Link]:
    """Of each collective, from a row that has them by themselves."""
    assert row.processes is not None
    ranks = row.processes.count
    found: dict[Name, Link] = {}
    for kind in _KINDS:
        (small, brief), (large, long) = (
            (each.received(ranks), row.times[name].ms) for name, each in BARE.items() if each.name == kind
        )
        # where it is all noise, a larger one is no faster
        bandwidth = (large - small) / max(long - brief, 1e-9)
        found[kind] = Link(brief - small / bandwidth, bandwidth)
    return found


def predicted(row: Row, exchanges: Iterable[Collective]) -> float:
    """Milliseconds that these exchanges of Sync add to the step of the row; alone, a rank has none."""
    assert row.processes is not None
    ranks = row.processes.count
    if ranks == 1:
        return 0.0
    of = links(row)
    return sum(of[each.name].ms(each.received(ranks)) for each in exchanges)
