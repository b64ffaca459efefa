"""The core needs torch alone; what the command line, the report and the experiments need are extras."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import batchnorm
from batchnorm import requirements
from batchnorm.cli import EXTRAS, main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCE = Path(batchnorm.__file__).parent
NOT_THE_CORE = {"bench", "cli", "data", "experiments", "records", "report", "training"}


def distributions(requirements):
    """Names of the distributions, and of the extras of the package itself that are asked for."""
    return {re.split(r"[<>=!~; ]", requirement)[0] for requirement in requirements}


def test_an_installation_requires_torch_alone():
    assert distributions(PROJECT["dependencies"]) == {"torch"}


def test_each_extra_contains_the_one_before():
    extras = {name: distributions(each) for name, each in PROJECT["optional-dependencies"].items()}
    assert list(extras) == ["cli", "train", "export", "interop", "dev"]
    assert "batchnorm[cli]" in extras["train"]
    assert "batchnorm[export]" in extras["interop"]
    assert "batchnorm[train,interop]" in extras["dev"]


def test_the_command_line_knows_what_each_extra_brings():
    imported = {"pillow": "PIL"}
    for name, packages in EXTRAS.items():
        required = distributions(PROJECT["optional-dependencies"][name])
        names = {imported.get(each, each.replace("-", "_")) for each in required if "[" not in each}
        assert set(packages) == names


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


def test_the_core_imports_torch_alone():
    core = [
        path
        for path in SOURCE.rglob("*.py")
        if path.relative_to(SOURCE).with_suffix("").parts[0] not in NOT_THE_CORE
    ]
    assert len(core) > 30
    allowed = {"torch", "batchnorm", *sys.stdlib_module_names}
    assert [
        f"{path.relative_to(SOURCE)} imports {name}"
        for path in core
        for name in imported_packages(path)
        if name not in allowed
    ] == []


def test_every_public_name_works_where_nothing_else_is_installed():
    absent = [name for packages in EXTRAS.values() for name in packages]
    script = Path(__file__).with_name("every_public_name.py")
    done = subprocess.run([sys.executable, script, *absent], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def command(*arguments, without):
    """`python -m batchnorm.cli` where the package `without` cannot be imported."""
    code = f"""
import runpy, sys
sys.modules[{without!r}] = None
sys.argv = ["batchnorm", *{arguments!r}]
runpy.run_module("batchnorm.cli", run_name="__main__")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "without"), [([], "typer"), (["report", "."], "pydantic"), (["report", "."], "matplotlib")]
)
def test_without_its_packages_the_command_line_says_in_one_line_what_to_install(arguments, without):
    done = command(*arguments, without=without)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert without in line
    assert re.search(r": pip install 'typer>=[\d.]+' 'rich>=[\d.]+' .*'numpy>=[\d.]+'$", line.strip())


@pytest.mark.parametrize("arguments", [["train", "--example"], ["train", "x.toml"], ["reproduce", "mnist"]])
def test_without_torch_a_command_that_needs_it_says_so_in_one_line(arguments):
    done = command(*arguments, without="torch")
    if arguments == ["train", "--example"]:
        assert (done.returncode, done.stderr) == (0, "")  # prints a text
        return
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: this needs torch, which is not installed: pip install 'torch>=[\d.]+'\n", done.stderr
    )


@pytest.fixture
def installed_torch(monkeypatch):
    """An installation whose torch is of another version."""

    def install(version):
        monkeypatch.setattr(requirements, "version", lambda _: version)
        requirements.old_torch.cache_clear()

    yield install
    requirements.old_torch.cache_clear()


@pytest.mark.parametrize("version", ["2.4.0", "1.13.1+cu117", "2.9.1", "2.9"])
def test_a_torch_that_is_too_old_is_said_in_one_line(installed_torch, monkeypatch, version):
    installed_torch(version)
    monkeypatch.setattr(sys, "argv", ["batchnorm", "train", "run.toml"])
    says = rf"torch {re.escape(version)} is installed, and this needs torch 2\.10 or newer: pip install 'torch>=2\.10'"
    with pytest.raises(SystemExit, match=says):
        main()
    monkeypatch.delitem(vars(batchnorm), "BatchNorm2d", raising=False)
    with pytest.raises(ImportError, match=says):
        batchnorm.BatchNorm2d  # noqa: B018


@pytest.mark.parametrize(
    "version", ["2.10.0", "2.10", "2.14.1+cpu", "3.0", "2.10.0a0+git123", "2.11.0.dev20260101"]
)
def test_a_torch_that_is_new_enough_is_not(installed_torch, version):
    installed_torch(version)
    assert requirements.old_torch() == ""


def failing_with(error):
    def run():
        raise error

    return run


def test_a_command_that_trains_names_the_other_extra(monkeypatch):
    error = ModuleNotFoundError("No module named 'accelerate'", name="accelerate")
    monkeypatch.setattr("batchnorm.cli.commands.run", failing_with(error))
    with pytest.raises(SystemExit, match=r"accelerate.*: pip install 'typer.*'accelerate>=[\d.]+'$"):
        main()


@pytest.mark.parametrize(
    "bug",
    [
        ModuleNotFoundError("No module named 'batchnorm.nowhere'", name="batchnorm.nowhere"),
        ModuleNotFoundError("No module named 'typer.nowhere'", name="typer.nowhere"),
        ImportError("cannot import name 'Nothing' from 'typer'", name="typer"),
    ],
)
def test_an_import_that_fails_for_another_reason_keeps_its_traceback(monkeypatch, bug):
    monkeypatch.setattr("batchnorm.cli.commands.run", failing_with(bug))
    with pytest.raises(ImportError) as caught:
        main()
    assert caught.value is bug
