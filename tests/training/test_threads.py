"""The number of threads that a training chooses: of the cores that it may use, those that are free."""

import multiprocessing
import os
import sys
import time

import pytest

from batchnorm.training import threads
from tests.mutations.mutation import Mutation

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")


def stat(*cores):
    """What /proc/stat tells of cores, (idle, busy) ticks of each."""
    lines = [f"cpu{number} {busy} 0 0 {idle} 0 0 0 0 0 0" for number, (idle, busy) in enumerate(cores)]
    return "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 1 2 3"])


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine by the content of its files: /proc/stat before and after, the container's quota."""

    def make(cores, before, after, quota=None, limited=""):
        told = [stat(*before), stat(*after)]

        class Files:
            def __init__(self, path):
                self.path = getattr(path, "path", path)

            def read_text(self):
                if self.path == "/proc/stat":
                    return told.pop(0)
                if self.path == "/proc/self/cgroup":
                    return "0::/user.slice/own.service\n"
                if self.path == f"/sys/fs/cgroup{limited}/cpu.max" and quota is not None:
                    return quota
                raise OSError

            def __truediv__(self, name):
                return Files(f"{self.path}/{name}")

        monkeypatch.setattr(threads, "Path", Files)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
        monkeypatch.setattr(threads, "available_cores", lambda: len(cores))
        return threads.free_cores()

    return make


IDLE, BUSY = (100, 0), (0, 100)


def after(*shares):
    return [(100 + idle, busy) for idle, busy in shares]


@pytest.mark.parametrize(
    ("cores", "shares", "quota", "expected"),
    [
        ({0, 1}, (IDLE, IDLE), None, (2, "2 of 2 cores are free")),
        ({0, 1}, (BUSY, IDLE), None, (1, "1 of 2 cores is free")),
        ({0, 1}, (BUSY, BUSY), None, (1, "none of 2 cores is free")),  # it has to run somewhere
        ({0, 1}, ((80, 20), (70, 30)), None, (2, "2 of 2 cores are free")),
        ({1}, (BUSY, IDLE, BUSY), None, (1, "1 of 1 core is free")),
        ({0, 2}, (IDLE, BUSY, IDLE), None, (2, "2 of 2 cores are free")),  # others' cores do not matter
        ({0, 1, 2, 3}, (IDLE,) * 4, "200000 100000", (2, "2 of 4 cores, of which 2 may be used are free")),
        (
            {0, 1, 2, 3},
            (BUSY, IDLE, IDLE, IDLE),
            "200000 100000",
            (2, "2 of 4 cores, of which 2 may be used are free"),
        ),
        ({0, 1}, (IDLE, IDLE), "50000 100000", (1, "1 of 2 cores, of which 1 may be used is free")),
        ({0, 1}, (IDLE, IDLE), "150000 100000", (1, "1 of 2 cores, of which 1 may be used is free")),
        ({0, 1}, (IDLE, IDLE), "max 100000", (2, "2 of 2 cores are free")),
        ({0, 1}, (IDLE, IDLE), "nonsense", (2, "2 of 2 cores are free")),
    ],
)
def test_of_the_cores_that_may_be_used_those_that_are_free(machine, cores, shares, quota, expected):
    assert machine(cores, [(100, 0)] * len(shares), after(*shares), quota) == expected


@pytest.mark.parametrize("limited", ["", "/user.slice", "/user.slice/own.service"])
def test_a_limit_of_the_service_or_of_one_that_it_is_in_counts(machine, limited):
    idle = [(100, 0)] * 4, after(IDLE, IDLE, IDLE, IDLE)
    assert machine({0, 1, 2, 3}, *idle, "300000 100000", limited)[0] == 3


def spin(ready):
    ready.set()
    while True:
        pass


@on_linux
@pytest.mark.slow
def test_a_core_that_really_is_busy_is_not_free():
    """Beside what else runs here, which may leave fewer free, never more."""
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    started = [context.Event() for _ in range(cores)]
    processes = [context.Process(target=spin, args=(each,), daemon=True) for each in started]
    for process in processes:
        process.start()
    try:
        assert all(each.wait(60) for each in started)
        assert threads.free_cores()[0] == 1
    finally:
        for process in processes:
            process.kill()


MUTATIONS = [
    Mutation(
        "busy cores counted as free", "training/threads.py",
        "return sum(share > _BUSY for share in shares)", "return 0",
        "threads would wait for each other at every operation",
    ),
]  # fmt: skip
