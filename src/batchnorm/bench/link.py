"""The predicted cost of Sync per step, from the latency and bandwidth of the collectives alone.

    time of a collective = latency + bytes that a rank receives / bandwidth

Latency and bandwidth of each collective and number of ranks follow from its times at two sizes. Sync's collectives of a
step are added up, since each layer waits for its own. They are timed between computations, so that the latency
includes waking ranks that sleep. The prediction ignores Sync's arithmetic and load imbalance between ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from batchnorm.bench.rows import Row
from batchnorm.bench.traffic import Collective, Name

SMALL, LARGE = 8, 2**20  # bytes of a rank's tensor: one number, and more than any layer sends

_KINDS: tuple[Name, ...] = ("all_gather", "all_reduce")

# The collectives that are timed, by the name of the candidate.
COLLECTIVES = {
    f"{kind}, {size:,} bytes": Collective(kind, size) for kind in _KINDS for size in (SMALL, LARGE)
}


class Link(NamedTuple):
    """Latency and bandwidth of a collective among a number of ranks, two or more."""

    latency: float  # milliseconds
    bandwidth: float  # bytes that a rank receives per millisecond

    def ms(self, received_bytes: float) -> float:
        """The time in ms of a collective in which a rank receives this many bytes."""
        return self.latency + received_bytes / self.bandwidth


def links(row: Row) -> dict[Name, Link]:
    """The link of each collective, from a row with the times of both sizes."""
    assert row.processes is not None
    ranks = row.processes.count
    links_by_kind: dict[Name, Link] = {}
    for kind in _KINDS:
        (small_bytes, small_time), (large_bytes, large_time) = (
            (each.received_bytes(ranks), row.times[name].ms)
            for name, each in COLLECTIVES.items()
            if each.name == kind
        )
        # noise may make the larger one faster, which would give a negative bandwidth
        bandwidth = (large_bytes - small_bytes) / max(large_time - small_time, 1e-9)
        links_by_kind[kind] = Link(small_time - small_bytes / bandwidth, bandwidth)
    return links_by_kind


def predict_ms(row: Row, exchanges: Iterable[Collective]) -> float:
    """The milliseconds that these `exchanges` of Sync add to a step of the row; 0 for a single rank."""
    assert row.processes is not None
    ranks = row.processes.count
    if ranks == 1:
        return 0.0
    by_name = links(row)
    return sum(by_name[exchange.name].ms(exchange.received_bytes(ranks)) for exchange in exchanges)
