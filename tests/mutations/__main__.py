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

from tests.mutations.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]


def run(tests: Sequence[str], mutation: Mutation | None) -> tuple[int, str, float]:
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
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}

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
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    every = sorted({test for mutation in chosen for test in mutation.tests})
    with ThreadPoolExecutor(2) as pool:  # one a core, each with one thread
        unmutated = pool.submit(run, every, None)
        runs = [(mutation, pool.submit(run, mutation.tests, mutation)) for mutation in chosen]
        survivors = 0
        for mutation, future in runs:
            status, test, seconds = future.result()
            caught = status == 1  # other statuses: nothing collected, interrupted, an error of pytest's
            survivors += not caught
            says = f"caught by {test}" if caught else f"SURVIVED ({mutation.why}; pytest's status {status})"
            print(f"{mutation.name}: {says} ({seconds:.0f} s)", flush=True)
        status, test, seconds = unmutated.result()
    if status != 0:
        print(f"without any mutation: {test} fails, so nothing above means anything")
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations caught")
    return int(survivors > 0 or status != 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
