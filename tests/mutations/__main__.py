"""Try every mutation, or those whose name contains a word given: `python -m tests.mutations [word ...]`.

Each is applied to a copy of src/, on which the tests it names must fail. Exit status 1 when one survives.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from batchnorm.kernels import choice
from tests.mutations.mutation import Mutation, every

ROOT = Path(__file__).parents[2]

# An editable installation's own finder comes before any path, in the processes that tests start as well.
SITE = """\
import importlib.machinery
import sys

paths = importlib.machinery.PathFinder
sys.meta_path[:] = [f for f in sys.meta_path if f is paths or f.find_spec("batchnorm", None) is None]
"""


def importing_from(source: Path, kernels: str) -> dict[str, str]:
    """The environment of a process that imports `source`/batchnorm, whatever is installed, and uses `kernels`."""
    (source / "sitecustomize.py").write_text(SITE)
    return {
        **os.environ, "PYTHONPATH": str(source), "BATCHNORM_KERNELS": kernels, "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def _with_native_kernels(source: Path) -> None:
    """Put those that were built beside the Python of the copy, which is all that a mutation changes."""
    if choice.built():
        from batchnorm.kernels import _native

        shutil.copy(str(_native.__file__), source / "batchnorm" / "kernels")


def run(tests: Sequence[str], mutation: Mutation | None, kernels: str) -> tuple[int, str, float]:
    """Pytest's exit status on a copy of src/ with the mutation, the first test that failed, seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            file = source / "batchnorm" / mutation.file
            text = file.read_text()
            assert text.count(mutation.old) == 1, f"{mutation.name}: its text has gone from {mutation.file}"
            file.write_text(text.replace(mutation.old, mutation.new))
        _with_native_kernels(source)
        environment = importing_from(source, kernels)

        def python(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-B", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
            )

        # An installed batchnorm must not be the one that is tested.
        imported = python("-c", "import batchnorm; print(batchnorm.__file__)").stdout
        assert imported.startswith(str(source)), f"the tests would import {imported} instead of the copy"
        paths = [f"tests/{name}" for name in tests]
        done = python("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths)
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, failed[1] if failed else done.stdout[-2000:], time.perf_counter() - start


def main(words: list[str]) -> int:
    chosen = [m for m in every() if not words or any(word in m.name for word in words)]
    if not choice.built() and any(mutation.kernels == "native" for mutation in chosen):
        print("the native kernels are not built here: what only they would notice survives")
    files: dict[str, set[str]] = {}
    for mutation in chosen:
        files.setdefault(mutation.kernels, set()).update(mutation.tests)
    with ThreadPoolExecutor(2) as pool:  # one a core, each with one thread
        unmutated = [pool.submit(run, sorted(tests), None, kernels) for kernels, tests in files.items()]
        runs = [(m, pool.submit(run, m.tests, m, m.kernels)) for m in chosen]
        survivors = 0
        for mutation, future in runs:
            status, test, seconds = future.result()
            caught = status == 1  # other statuses: nothing collected, interrupted, an error of pytest's
            survivors += not caught
            says = f"caught by {test}" if caught else f"SURVIVED ({mutation.why}; pytest's status {status})"
            print(f"{mutation.name}: {says} ({seconds:.0f} s)", flush=True)
        broken = [(kernels, *future.result()[:2]) for kernels, future in zip(files, unmutated, strict=True)]
    broken = [(kernels, status, test) for kernels, status, test in broken if status != 0]
    for kernels, _, test in broken:
        print(f"without any mutation: {test} fails with {kernels} kernels, so nothing above means anything")
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations caught")
    return int(survivors > 0 or bool(broken) or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
