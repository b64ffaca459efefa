"""Threads: the native kernels' own, Python's, and those that a fork leaves behind."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HAS_PROC = Path("/proc/self/task").exists()

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("batchnorm.kernels._native") is None, reason="installed without native kernels"
)
on_linux = pytest.mark.skipif(not HAS_PROC, reason="needs /proc")


def run(task: str) -> None:
    """A process of its own, for threads once started stay; one that hangs is ended with its children."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.native.tasks", task],
        cwd=ROOT,
        env={**os.environ, "BATCHNORM_KERNELS": "native"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{task} hangs: {process.communicate()[0]}")
    assert process.returncode == 0, said


def test_results_are_the_same_for_any_number_of_threads():
    run("any_number_of_threads")


def test_calls_from_several_python_threads_do_not_meet():
    run("python_threads")


def test_other_python_threads_go_on_during_a_call():
    run("without_the_gil")


@on_linux
def test_a_forked_child_computes_the_same():
    run("after_a_fork")


@on_linux
def test_a_worker_of_a_data_loader_computes_the_same():
    run("data_loader_workers")


@on_linux
def test_there_is_one_openmp_runtime():
    run("one_openmp_runtime")


@on_linux
def test_no_more_threads_are_started_than_torch_may_use():
    run("as_many_threads_as_torch")


@on_linux
def test_little_work_ends_no_threads():
    run("the_same_threads_go_on")
