"""`batchnorm bench` as a user meets it. No time is asserted: the machine has other things to do."""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch

import batchnorm as bn
from batchnorm.bench.link import COLLECTIVES
from batchnorm.bench.rows import COMMANDS, read
from tests.command import COMMAND

pytest.importorskip("torchvision", reason="the networks are torchvision's")


_GUESTS = {"timm", "Keras"}  # where they are installed


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def bench(here, forking):
    """The command in this process, which afterwards has its threads and its memory as before."""
    threads = torch.get_num_threads()
    yield partial(here, "bench")
    torch.set_num_threads(threads)
    bn.return_memory()


@pytest.mark.slow
def test_all_of_it_on_one_page(bench, tmp_path):
    done = bench("all", "--quick", "--out", tmp_path)
    assert done.code == 0, done.error
    assert {path.name for path in tmp_path.iterdir()} == {
        "RESULTS.md",
        *(f"{command}.{kind}" for command in COMMANDS for kind in ("json", "png")),
    }
    page = (tmp_path / "RESULTS.md").read_text()
    assert "tiny shapes: not a measurement" in page
    assert "OMP_NUM_THREADS=1" in page
    assert "BN+ReLU against torch, channels-last, bfloat16" in done.out
    steps = read(tmp_path / "step.json")
    assert steps.finished
    assert [(row.name, row.layout) for row in steps.rows] == [
        ("mlp", "(N, C)"),
        ("resnet18", "NCHW"),
        ("resnet18", "channels-last"),
        ("resnet18", "own settings"),
    ]
    assert set(steps.rows[1].times) == {"ours", "torch", "without BN"}
    assert all(time.ms > 0 for row in steps.rows for time in row.times.values())
    modes = read(tmp_path / "statistics.json")
    assert {row.name: set(row.times) - _GUESTS for row in modes.rows} == {
        "Ghost(2)": {"ours", "plain", "loop", "copy"},
        "Renorm": {"ours", "plain", "copy"},
        "Population": {"ours", "plain", "torch", "copy"},
        "mask": {"ours", "plain", "by hand", "copy"},
        "per activation": {"ours", "plain", "torch", "copy"},
        "Sync, 2 ranks": {"ours", "plain", "collectives"},
        "virtual_batch": {"ours", "one batch", "accumulation"},
    }
    ranks = read(tmp_path / "scaling.json")
    assert [row.processes.count for row in ranks.rows if row.processes] == [1, 2]
    assert all(set(row.times) == {"ours", "plain", *COLLECTIVES} for row in ranks.rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options", "names"),
    [
        ("kernels", ("--full", "--dtypes", "bfloat16", "--threads", 1), {"BN", "BN+ReLU", "BN+add+ReLU"}),
        ("step", ("--networks", "mlp", "--threads", 1), {"mlp"}),
        ("infer", ("--networks", "mlp", "--dtypes", "float32"), {"BN+ReLU", "mlp"}),
    ],
)
def test_each_command_measures_what_it_is_told_to(bench, tmp_path, command, options, names):
    done = bench(command, "--quick", *options, cwd=tmp_path)
    assert done.code == 0, done.error
    (folder,) = (tmp_path / "runs").iterdir()
    measured = read(folder / f"{command}.json")
    assert {row.name for row in measured.rows} == names
    assert {row.rounds for row in measured.rows} == {3}
    assert measured.threads == 1
    assert f"{folder.name}/RESULTS.md" in done.out.replace("\n", "")


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "bench", "kernels", "--quick", "--seconds", "1", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "torch/ours" in line:  # the first case has ended, the second is being measured
            os.killpg(process.pid, signal.SIGINT)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert f"Stopped. Results so far:  {tmp_path / 'RESULTS.md'}" in rest
    measured = read(tmp_path / "kernels.json")
    assert not measured.finished
    assert [row.part for row in measured.rows] == ["forward", "backward", "both"]
    assert "rows are missing" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("kernels", "--dtypes", "float16"), "--dtypes: Input should be 'float32' or 'bfloat16'"),
        (("step", "--networks", "resnet19"), "no network resnet19: choose from mlp, resnet18"),
    ],
)
def test_a_wrong_choice_is_one_line(bench, arguments, advice):
    done = bench(*arguments)
    assert done.code == 1
    assert advice in done.error
    assert len(done.error.splitlines()) == 1


def test_help_teaches_by_examples_without_torch():
    code = """
import contextlib, sys
from batchnorm.cli import main
for command in sys.argv[1:]:
    sys.argv = ["batchnorm", "bench", command, "--help"]
    with contextlib.suppress(SystemExit):
        main()
sys.exit("too much was imported" if {"torch", "matplotlib"} & set(sys.modules) else 0)
"""
    commands = [*COMMANDS, "all"]
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, check=True)
    for command in commands:
        assert f"batchnorm bench {command} " in done.stdout
