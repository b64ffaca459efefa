"""Page faults as the kernel counts them, in processes of their own: the setting is the whole process's."""

import ctypes
import os
import shutil
import subprocess
import sys

import pytest

from batchnorm import memory

_GLIBC = pytest.mark.skipif(
    not memory._malloc_is_glibc(), reason="glibc's malloc does not serve this process"
)

# Two tensors of 48 MB come and go, as outputs of layers do: 12,288 pages of 4 kB each, fewer if pages are larger.
_COUNT = """
import resource
import torch
import batchnorm as bn

torch.set_num_threads(1)
x = torch.ones(12 * 2**20)

def use(times):
    for _ in range(times):
        y = x + 1
        z = y * 2
        del y, z

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use(times)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // times

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 2**20
"""


def printed(script, **environment):
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.slow
@_GLIBC
def test_kept_memory_is_not_faulted_in_again_and_returned_memory_is():
    script = f"""{_COUNT}
use(3)
print(faults(5), end=" ")
print(bn.keep_memory(), end=" ")
use(10)
print(faults(20), held(), end=" ")
print(bn.return_memory(), held(), faults(1))
"""
    plain, took, kept, held, gave, left, returned = printed(script, OMP_NUM_THREADS="1")
    if int(plain) < 1000:
        pytest.skip(
            f"only {plain} page faults without it: environment variables or huge pages see to it here"
        )
    assert (took, gave) == ("True", "True")
    assert int(kept) < int(plain) / 20
    assert int(returned) > int(plain) / 5
    assert int(held) - int(left) > 48  # MB: at least one of the two tensors


def test_it_can_be_asked_for_again():
    asks = "bn.keep_memory(), bn.keep_memory(), bn.return_memory(), bn.return_memory()"
    assert len(set(printed(f"import batchnorm as bn; print({asks})"))) == 1


@_GLIBC
def test_another_malloc_is_told_from_glibc_s(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(
        "#include <stddef.h>\nvoid *__libc_malloc(size_t n);\nvoid *malloc(size_t n) { return __libc_malloc(n); }\n"
        "int mallopt(int option, int value) { return 1; }\n"  # as tcmalloc's: a promise and nothing behind it
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    script = "import batchnorm as bn; print(bn.keep_memory(), bn.return_memory())"
    assert printed(script, LD_PRELOAD=str(library)) == ["False", "False"]


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_it_says_no(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    assert not memory.keep_memory()
    assert not memory.return_memory()


def test_without_glibc_it_says_no(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not memory.keep_memory()
