"""Threads: the native kernels' own, Python's, and those that a fork leaves behind."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from tests.forked import Forked
from tests.native import tasks

HAS_PROC = Path("/proc/self/task").exists()

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("batchnorm.kernels._native") is None, reason="installed without native kernels"
)
on_linux = pytest.mark.skipif(not HAS_PROC, reason="needs /proc")


@pytest.fixture
def run(tmp_path):
    """A process of its own, for threads once started stay; one that hangs is ended with its children."""

    def call(task: str) -> None:
        env = {**os.environ, "BATCHNORM_KERNELS": "native"}
        process = Forked(tasks.main, task, out=tmp_path / task, env=env)
        status = process.join(60)
        if status is None:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"{task} hangs: {process.out}{process.err}")
        assert status == 0, process.err

    return call


def test_results_are_the_same_for_any_number_of_threads(run):
    run("any_number_of_threads")


def test_calls_from_several_python_threads_do_not_meet(run):
    run("python_threads")


@pytest.mark.slow
def test_other_python_threads_go_on_during_a_call(run):
    run("without_the_gil")


@on_linux
def test_a_forked_child_computes_the_same(run):
    run("after_a_fork")


@on_linux
def test_a_worker_of_a_data_loader_computes_the_same(run):
    run("data_loader_workers")


@on_linux
def test_there_is_one_openmp_runtime(run):
    run("one_openmp_runtime")


@on_linux
def test_no_more_threads_are_started_than_torch_may_use(run):
    run("as_many_threads_as_torch")


@on_linux
def test_little_work_ends_no_threads(run):
    run("the_same_threads_go_on")
