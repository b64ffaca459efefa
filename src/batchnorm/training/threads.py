"""The number of threads of a training on a CPU: one for each core that is free when it starts.

More threads than free cores wait for each other at every operation: on two cores with other work on both, two threads
have taken 6 s a step where one took 0.3 s.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from batchnorm.training.workers import available_cores

_SAMPLE = 0.2  # seconds for which the cores are watched
_BUSY = 0.5  # a core with a larger share of its time in use is no free one


def free_cores() -> tuple[int, str]:
    """The number of cores that this process can use now, at least 1, and what it is of: "2 of 2 cores are free".

    Cores are those of the process's affinity, as far as a container's quota allows; those that others use do not count.
    """
    cores = available_cores()
    quota = _quota()
    allowed = cores if quota is None else max(1, min(cores, int(quota)))
    free = min(allowed, cores - _busy_cores())
    of = f"{cores} core{'s' * (cores > 1)}" + (f", of which {allowed} may be used" if allowed < cores else "")
    return max(1, free), f"{free or 'none'} of {of} {'is' if free < 2 else 'are'} free"


def _busy_cores() -> int:
    """How many of the process's cores others use; 0 where the system does not tell."""
    before = _times()
    if before is None:
        return 0
    time.sleep(_SAMPLE)
    after = _times() or before
    shares = [
        1 - (idle - before[core][0]) / max(1, total - before[core][1])
        for core, (idle, total) in after.items()
        if core in before
    ]
    return sum(share > _BUSY for share in shares)


def _times() -> dict[int, tuple[int, int]] | None:
    """(idle, total) of the time of each of the process's cores, in ticks."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    found = {}
    for line in lines:
        name, *fields = line.split()
        core = name.removeprefix("cpu")
        if name.startswith("cpu") and core.isdecimal() and int(core) in os.sched_getaffinity(0):
            ticks = [int(field) for field in fields[:8]]
            found[int(core)] = ticks[3] + ticks[4], sum(ticks)  # idle, and idle while it waits for a disk
    return found or None


def _quota() -> float | None:
    """How many cores' time the process's cgroup, or one that it is in, may use; None without a limit."""
    found = []
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # in a container the root is the process's own; on a host a service is some folders below
        folder = Path("/sys/fs/cgroup/cpu") if controllers else Path("/sys/fs/cgroup")
        for part in ("", *path.split("/")):
            folder = folder / part if part else folder
            found += _limits(folder)
    return min(found, default=None)


def _limits(folder: Path) -> list[float]:
    """The limit in a folder of version 2, or of version 1, in cores; none or one."""
    words = _text(folder / "cpu.max").split() or [
        word for name in ("quota", "period") for word in _text(folder / f"cpu.cfs_{name}_us").split()
    ]
    try:
        quota, period = map(int, words)
    except ValueError:  # "max", or no such file
        return []
    return [quota / period] if quota > 0 and period > 0 else []


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
