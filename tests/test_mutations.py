"""The list of mutations does not rot; `python -m tests.mutations` (make mutations) runs it."""

import subprocess
import sys

import pytest

from tests.mutations.__main__ import ROOT, importing_from, main
from tests.mutations.mutation import every

MUTATIONS = every()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_can_be_applied_and_names_its_tests(mutation):
    text = (ROOT / "src" / "batchnorm" / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
    compile(
        text.replace(mutation.old, mutation.new), mutation.file, "exec"
    )  # caught by a test, not by the parser
    assert mutation.tests
    assert all((ROOT / "tests" / name).exists() for name in mutation.tests)


def test_those_beside_tests_are_found():
    found = {mutation.name: mutation.tests for mutation in MUTATIONS}
    assert found["a rank reads all of the batch"] == ("data/test_order.py",)


def test_names_are_unique():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 20


def test_the_copy_s_source_stands_before_the_installed_one(tmp_path):
    (tmp_path / "batchnorm").mkdir()
    (tmp_path / "batchnorm" / "__init__.py").write_text("copied = True")
    asks = [sys.executable, "-c", "import batchnorm; batchnorm.copied"]
    for arguments in (asks, [sys.executable, "-c", f"import subprocess; subprocess.run({asks}, check=True)"]):
        run = subprocess.run(
            arguments, env=importing_from(tmp_path, "native"), cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr


def outcome(status):
    return lambda tests, mutation, kernels: (0 if mutation is None else status, "a test", 0.0)


@pytest.mark.parametrize(
    ("word", "status_of_mutated", "exit_status", "says"),
    [
        ("momentum swapped", 1, 0, "momentum swapped: caught by a test"),
        ("momentum swapped", 0, 1, "momentum swapped: SURVIVED"),
        (
            "momentum swapped",
            2,
            1,
            "momentum swapped: SURVIVED",
        ),  # tests that cannot be collected catch nothing
        ("no such", 1, 1, "0 of 0"),
    ],
)
def test_a_survivor_is_told(monkeypatch, capsys, word, status_of_mutated, exit_status, says):
    monkeypatch.setattr("tests.mutations.__main__.run", outcome(status_of_mutated))
    assert main([word]) == exit_status
    assert says in capsys.readouterr().out


def test_tests_that_fail_without_a_mutation_prove_nothing(monkeypatch, capsys):
    monkeypatch.setattr("tests.mutations.__main__.run", lambda tests, mutation, kernels: (1, "a test", 0.0))
    assert main(["momentum swapped"]) == 1
    assert "nothing above means anything" in capsys.readouterr().out
