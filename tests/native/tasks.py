"""What the tests of threads run in a process of their own."""

import hashlib
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import batchnorm as bn

# Enough of each for two threads and more: parts of a group, groups of channels, rows.
SHAPES = [(8, 16, 56, 56), (4, 300, 7, 7), (2000, 256), (64, 2500)]


def problem(shape: tuple[int, ...]) -> tuple[bn.BatchNorm2d | bn.BatchNorm1d, Tensor, Tensor]:
    kind = bn.BatchNorm2d if len(shape) == 4 else bn.BatchNorm1d
    layer = kind(shape[1], activation="relu")
    return layer, torch.randn(shape).add_(100).requires_grad_(), torch.randn(shape)


def digest(layer: torch.nn.Module, x: Tensor, dy: Tensor) -> str:
    """Of all that a step computes."""
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    everything = hashlib.sha256()
    for tensor in (y.detach(), *gradients, *layer.buffers()):
        everything.update(tensor.numpy().tobytes())
    return everything.hexdigest()


def every_digest(threads: int) -> list[str]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return [digest(*problem(shape)) for shape in SHAPES]


def threads_of_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def any_number_of_threads() -> None:
    expected = every_digest(1)
    for threads in (1, 2, 2, 3, 5, 16, 1):
        assert every_digest(threads) == expected, threads


def python_threads() -> None:
    problems = [problem(shape) for shape in SHAPES * 2]
    rounds = 5
    states = [{name: value.clone() for name, value in layer.state_dict().items()} for layer, _, _ in problems]
    expected = [[digest(*each) for _ in range(rounds)] for each in problems]
    for (layer, _, _), state in zip(problems, states, strict=True):
        layer.load_state_dict(state)
    for threads in (1, 2):
        found: list[list[str]] = [[] for _ in problems]

        def work(i: int, threads: int = threads, found: list[list[str]] = found) -> None:
            torch.set_num_threads(threads)
            found[i].extend(digest(*problems[i]) for _ in range(rounds))

        workers = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert found == expected
        for (layer, _, _), state in zip(problems, states, strict=True):
            layer.load_state_dict(state)


def without_the_gil() -> None:
    """Another Python thread goes on while a call computes."""
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)
    layer, x = bn.BatchNorm2d(64), torch.randn(64, 64, 64, 64)
    dy = torch.randn_like(x)
    ticks, stop = [time.perf_counter()], threading.Event()

    def count() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())

    other = threading.Thread(target=count)
    other.start()

    def longest_pause(call: Callable[[], object]) -> float:
        """As a share of the call."""
        start, first = time.perf_counter(), len(ticks) - 1
        call()
        end, last = time.perf_counter(), len(ticks)
        seen = [start, *(t for t in ticks[first:last] if start < t < end), end]
        return max(b - a for a, b in itertools.pairwise(seen)) / (end - start)

    try:
        for needs_grad in (False, True):
            x.requires_grad_(needs_grad)
            y = layer(x)

            def call(y: Tensor = y, backward: bool = needs_grad) -> object:
                return torch.autograd.grad(y, x, dy, retain_graph=True) if backward else layer(x)

            # on a busy machine the other thread may have to wait for a core
            assert min(longest_pause(call) for _ in range(8)) < 0.4, "backward" if needs_grad else "forward"
    finally:
        stop.set()
        other.join()


def in_child(work: Callable[[], bool]) -> None:
    child = os.fork()
    if child == 0:
        good = False
        try:
            good = work()
        finally:
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def after_a_fork() -> None:
    torch.set_num_threads(2)
    alone = threads_of_process()
    problems = [problem(shape) for shape in SHAPES]
    states = [{name: value.clone() for name, value in layer.state_dict().items()} for layer, _, _ in problems]
    expected = [digest(*each) for each in problems]
    assert threads_of_process() > alone  # there are threads to lose

    def computes_the_same() -> bool:
        for (layer, _, _), state in zip(problems, states, strict=True):
            layer.load_state_dict(state)
        return [digest(*each) for each in problems] == expected

    in_child(computes_the_same)
    assert computes_the_same()  # and the parent goes on
    in_child(computes_the_same)

    def forks_again() -> bool:
        in_child(computes_the_same)
        return True

    in_child(forks_again)


class Digests(Dataset[list[str]]):
    def __init__(self, threads: int) -> None:
        self.threads = threads
        torch.manual_seed(0)
        self.problems = [problem(shape) for shape in SHAPES]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[str]:
        if index >= len(self):
            raise IndexError(index)
        if self.threads > 1:  # a worker starts with 1
            torch.set_num_threads(self.threads)
        for layer, _, _ in self.problems:
            layer.reset_running_stats()
        return [digest(*each) for each in self.problems]


def data_loader_workers() -> None:
    expected = every_digest(2)
    for threads in (1, 2):
        loader = DataLoader(Digests(threads), batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert list(loader) == [expected, expected]


def one_openmp_runtime() -> None:
    every_digest(2)
    libraries = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line
    }
    runtimes = {path for path in libraries if re.match(r"lib(gomp|i?omp5?)\b", Path(path).name)}
    assert len(runtimes) == 1, runtimes


def as_many_threads_as_torch() -> None:
    torch.set_num_threads(1)
    layer, x, dy = problem(SHAPES[0])
    before = threads_of_process()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        digest(layer, x, dy)
        layer.eval()(x)
        layer.train()
        assert threads_of_process() == before + threads - 1, threads


def the_same_threads_go_on() -> None:
    torch.set_num_threads(4)
    large, small = problem(SHAPES[0]), problem((64, 512))  # work for four, and for fewer
    digest(*large)
    before = os.listdir("/proc/self/task")
    for _ in range(3):
        digest(*small)
        digest(*large)
        assert os.listdir("/proc/self/task") == before


def main(name: str) -> None:
    assert bn.kernels.active() == "native"
    globals()[name]()
