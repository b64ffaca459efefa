"""Processes answer in order, leave when they should and no sooner."""

import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from batchnorm.data.idx import DataError
from batchnorm.data.processes import Processes


def squared_by(request):
    if request < 0:
        raise DataError(f"{request} has no root")
    return request**2, os.getpid(), signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def finalised(folder):
    """A file in `folder` if this process comes to finalise its interpreter."""
    atexit.register((Path(folder) / "finalised").touch)
    return os.getpid()


@pytest.mark.slow
def test_processes_end_without_finalising_the_interpreter(tmp_path):
    """Where torch's thread that shares the answers is aborted now and then."""
    processes = Processes(finalised, [str(tmp_path)], 1)
    (pid,) = processes
    del processes
    with pytest.raises(ProcessLookupError):  # the loader has waited for it
        os.kill(pid, 0)
    assert list(tmp_path.iterdir()) == []


def test_without_processes_an_answer_is_found_here_when_it_is_asked_for():
    asked: list[int] = []
    answers = iter(Processes(asked.append, iter(range(9))))
    assert asked == []
    next(answers)
    assert asked == [0]
    with pytest.raises(DataError, match=r"^-1 has no root$"):
        list(Processes(squared_by, [2, -1]))


@pytest.mark.slow
def test_processes_answer_in_order_again_and_again_and_outlive_the_signals_of_their_group():
    state = torch.get_rng_state()
    processes = Processes(squared_by, [3, 1, 2, -1], 2)
    pids = set()
    for _ in range(2):
        answers = iter(processes)
        for root in (3, 1, 2):
            square, pid, deaf = next(answers)
            assert (square, deaf) == (root**2, True)
            pids.add(pid)
            subprocess.run(["kill", "-INT", str(pid)], check=True)
            subprocess.run(["kill", "-TERM", str(pid)], check=True)  # of another's, not of this one's
        with pytest.raises(DataError, match=r"^-1 has no root$"):
            next(answers)
    assert len(pids) == 2  # the same ones, still there
    assert os.getpid() not in pids
    assert torch.equal(torch.get_rng_state(), state)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}
    del processes, answers
    assert all(gone(pid, within=10) for pid in pids)


def slowly(request):
    time.sleep(60 * request)
    return os.getpid()


SCRIPT = """
import itertools, sys
from batchnorm.data.processes import Processes
from tests.data.test_processes import slowly

if __name__ == "__main__":
    answers = iter(Processes(slowly, itertools.count(), 1))
    print(next(answers), flush=True)
    sys.stdin.readline()
    sys.exit("done")  # while a process is at work
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "left"])
def test_processes_do_not_outlive_their_parent_nor_keep_it(tmp_path, end):
    (tmp_path / "script.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout
        try:
            pid = int(parent.stdout.readline())
            if end == "left":
                assert parent.communicate("\n", timeout=20) == ("", "done\n")
        finally:
            parent.kill()
        assert gone(pid, within=5)


def gone(pid, within):
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(") ", 1)[1][0] == "Z":  # left, and not yet asked how
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False
