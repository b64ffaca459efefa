"""The native code without Python: native/tests, as it is shipped and under the sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "native" / "tests"
SANITIZERS = "-fsanitize=address,undefined"
SECONDS = 1200  # to compile: a tenth of it is usual; this only ends what hangs


def output_of(command: list[str | Path], seconds: float) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"},
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout[-5000:]}"
    return done.stdout


def built() -> Path | None:
    """The build that an editable installation has left, if its kernels are those of the sources as they are."""
    sources = [*SOURCE.parent.glob("*.cpp"), *SOURCE.parent.glob("*.h"), SOURCE.parent / "kernels.cmake"]
    newest = max(each.stat().st_mtime for each in sources)
    for folder in (ROOT / "build").glob("*"):
        objects = list(folder.glob("CMakeFiles/kernels*.dir/*.o"))
        if len(objects) >= 3 and all(each.stat().st_mtime > newest for each in objects):
            return folder
    return None


pytestmark = pytest.mark.slow


@pytest.fixture(
    scope="session",
    params=[pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in ("shipped", "sanitized")],
)
def program(request, tmp_path_factory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if shutil.which("cmake") is None or compiler is None:
        pytest.skip("needs cmake and a C++ compiler")
    folder: Path = tmp_path_factory.mktemp(request.param)
    sanitize = request.param == "sanitized"
    if sanitize:
        (folder / "empty.cpp").write_text("int main() {}\n")
        probe = [compiler, SANITIZERS, "empty.cpp", "-o", "empty"]
        linked = subprocess.run(probe, cwd=folder, capture_output=True).returncode == 0
        if not linked or subprocess.run([folder / "empty"], capture_output=True).returncode != 0:
            pytest.skip(f"{compiler} has no {SANITIZERS} here")
    options = ["-DBATCHNORM_SANITIZE=ON"] if sanitize else [f"-DBATCHNORM_BUILT={built() or ''}"]
    output_of(["cmake", "-S", SOURCE, "-B", folder, *options], 60)
    output_of(["cmake", "--build", folder, "--parallel", "2"], SECONDS)
    return folder / "native_tests"


@pytest.mark.parametrize(
    "suite", ["numbers", "values", "accuracy", "shapes", "large", "selections", "groups"]
)
def test_suite(program, suite):
    assert f"{suite}: 0 failures" in output_of([program, suite], 120)
