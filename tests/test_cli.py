"""The command line as a user meets it: real files, real signals, and where they matter real processes."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from batchnorm.records import RecordFile
from tests.command import COMMAND, batchnorm
from tests.interrupted import stopped_by_ctrl_c

MEASURED = Path(__file__).parents[1] / "docs" / "measured" / "mnist.jsonl"

of_a_run = pytest.mark.xdist_group("the run of mnist")
slow = pytest.mark.slow


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def comparable(folder: Path) -> list[str]:
    """What must be the same every time: all but clock, folder name and how often a verdict was written."""
    lines = [
        {k: v for k, v in r.items() if k not in ("seconds", "started", "command")} for r in records(folder)
    ]
    networks = [line for line in lines if line["kind"] in ("evaluation", "result")]
    last = {(r["kind"], r.get("name", r["claim"])): r for r in lines if r["kind"] in ("chart", "verdict")}
    return [json.dumps(line, sort_keys=True) for line in [*networks, *last.values()]]


SMALL = ("--steps", 60, "--seeds", 1)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """What two training processes left."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = batchnorm("reproduce", "mnist", *SMALL, "--out", folder)
    assert done.code == 0, done.error
    return folder


def test_help_is_quick_and_does_not_import_torch():
    code = """
import sys
from batchnorm.cli import main
sys.argv = ["batchnorm", "--help"]
try:
    main()
finally:
    assert not {"torch", "matplotlib", "pydantic"} & set(sys.modules), "too much was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert b"reproduce" in done.stdout
    libraries = [sys.executable, "-c", "import pydantic, typer, typer.rich_utils"]
    help_, start = [], []
    for _ in range(3):
        start.append(cpu_seconds(libraries))
        help_.append(cpu_seconds([*COMMAND, "--help"]))
    # of a core, the best of three, beside what its libraries take on the same machine
    assert min(help_) < 2 * min(start)


@pytest.mark.parametrize(
    ("words", "offered"),
    [("tr", {"train"}), ("reproduce ", {"mnist", "imagenet", "ensemble"}), ("train --dry", {"--dry-run"})],
)
def test_a_shell_can_complete_commands_and_options(words, offered):
    environment = {
        **os.environ,
        "_BATCHNORM_COMPLETE": "complete_bash",
        "COMP_WORDS": f"batchnorm {words}",
        "COMP_CWORD": str(len(words.split(" "))),
    }
    code = "import sys; sys.argv = ['batchnorm']; from batchnorm.cli import main; main()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert offered <= set(done.stdout.split()), done.stderr


def test_several_reports_are_rebuilt_by_one_command(here, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(MEASURED, tmp_path / name / "records.jsonl")
    done = here("report", tmp_path / "a", tmp_path / "b")
    assert (done.code, done.error) == (0, "")
    assert done.out.split() == [str(tmp_path / name / "report.html") for name in ("a", "b")]
    done = here("report", tmp_path / "none", tmp_path / "b")
    assert done.code == 1 and "none is not the folder of a run" in done.error
    assert done.out.split() == [str(tmp_path / "b" / "report.html")]


def cpu_seconds(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "arguments", [["reproduce", "--help"], ["reproduce", "mnist", "-h"], ["report", "--help"]]
)
def test_every_command_explains_itself(here, arguments):
    done = here(*arguments)
    assert done.code == 0
    assert "Usage" in done.out


@slow
@of_a_run
def test_a_run_leaves_records_events_figures_and_a_page(run):
    kinds = [record["kind"] for record in records(run)]
    assert kinds[0] == "run"
    assert kinds[-1] == "verdict"
    head = records(run)[0]
    assert head["config"] == {
        "data": "mnist-10k",
        "steps": 60,
        "seeds": 1,
        "rate": 0.1,
        "init_std": 0.1,
        "claims": ["figure-1"],
    }
    assert head["versions"].keys() == {"python", "batchnorm", "torch"}
    assert (run / "report.html").stat().st_size > 10_000
    assert {path.name for path in (run / "figures").iterdir()} >= {
        "figure-1a.png",
        "figure-1a.svg",
        "figure-1bc.png",
    }
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is an extra"
    )
    events = event_accumulator.EventAccumulator(str(run / "tensorboard" / "same-rate-bn-seed0")).Reload()
    written = [
        (r["step"], r["accuracy"])
        for r in records(run)
        if r.get("job") == "same-rate-bn-seed0" and "step" in r
    ]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("accuracy/test")] == written


@slow
@of_a_run
def test_stopped_by_ctrl_c_and_continued_it_gives_the_same_record(here, forking, run, tmp_path):
    folder = tmp_path / "stopped"
    rest, errors = stopped_by_ctrl_c(*COMMAND, "reproduce", "mnist", *SMALL, "--out", folder)
    assert errors == ""
    assert f"--out {folder} --resume" in rest
    assert (folder / "report.html").exists()
    stopped = records(folder)
    assert stopped[-1]["outcome"] == "incomplete"
    assert any(record["kind"] == "evaluation" for record in stopped)
    assert len(stopped) < len(records(run))
    done = here("reproduce", "mnist", "--out", folder, "--resume", "--workers", 1)
    assert done.code == 0, done.error
    assert sorted(comparable(folder)) == sorted(comparable(run))
    assert records(folder)[-1]["outcome"] != "incomplete"


@slow
@pytest.mark.parametrize(
    ("number", "delay"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 1.0), (signal.SIGINT, 2.5)]
)
def test_stopped_while_it_starts_it_says_how_to_go_on(tmp_path, number, delay):
    folder = tmp_path / "early"
    process = subprocess.Popen(
        [*COMMAND, "reproduce", "mnist", *map(str, SMALL), "--steps", "5000", "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (folder / "records.jsonl").exists():  # from here on there is something to go on with
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    time.sleep(delay)  # the training processes are being started, one after the other
    os.killpg(process.pid, number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in out
    assert errors == ""
    assert records(folder)[-1]["outcome"] == "incomplete"
    assert (folder / "report.html").exists()


@slow
def test_a_killed_parent_leaves_no_process_behind(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "reproduce", "mnist", "--steps", "100000", "--out", str(tmp_path / "run")],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )

    def alive() -> int:
        states = [Path(f"/proc/{name}/stat") for name in os.listdir("/proc") if name.isdigit()]
        sessions = []
        for path in states:
            with contextlib.suppress(OSError):
                fields = path.read_text().rsplit(")", 1)[1].split()
                sessions.append(int(fields[3]) if fields[0] != "Z" else 0)
        return sessions.count(process.pid)

    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc to count processes")
    deadline = time.monotonic() + 60
    while alive() < 3:  # the parent and two more at least
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    while alive():
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.1)


@slow
@of_a_run
def test_two_processes_do_not_write_one_run(here, forking, run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    with RecordFile(folder / "records.jsonl"):
        done = here("reproduce", "mnist", "--out", folder, "--resume")
    assert done.code == 1
    assert "another process" in done.error


@slow
@of_a_run
def test_odd_folder_names_and_locales_are_no_trouble(here, forking, run, tmp_path):
    folder = tmp_path / "with space, 'quote', [red]markup[/] and ×"
    shutil.copytree(run, folder)
    done = here("reproduce", "mnist", "--out", folder, "--resume")
    assert done.code == 0, done.error
    assert str(folder) in done.out
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments in (
        ["reproduce", "mnist", "--help"],
        ["reproduce", "mnist", "--out", str(run), "--resume"],
    ):
        plain = subprocess.run(
            [*COMMAND, *arguments], env=ascii_only, capture_output=True, timeout=120, check=False
        )
        assert plain.returncode == 0, plain.stderr


@slow
@of_a_run
def test_resume_takes_the_newest_run_that_was_stopped(here, forking, run, tmp_path):
    (tmp_path / "runs").mkdir()
    shutil.copytree(run, tmp_path / "runs" / "mnist-stopped")
    path = tmp_path / "runs" / "mnist-stopped" / "records.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    shutil.copytree(run, tmp_path / "runs" / "mnist-newer")
    done = here("reproduce", "mnist", "--resume", cwd=tmp_path)
    assert done.code == 0, done.error
    assert "runs/mnist-stopped" in done.out
    assert "runs/mnist-newer" not in done.out


@slow
@of_a_run
def test_going_on_with_a_complete_run_changes_nothing(here, forking, run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    assert here("reproduce", "mnist", "--out", folder, "--resume").code == 0
    assert (folder / "records.jsonl").read_bytes() == (run / "records.jsonl").read_bytes()


@slow
@of_a_run
def test_killed_in_the_middle_it_is_continued_from_what_is_there(here, forking, run, tmp_path):
    folder = tmp_path / "killed"
    shutil.copytree(run, folder)
    text = (folder / "records.jsonl").read_bytes()
    (folder / "records.jsonl").write_bytes(text[: len(text) // 2])  # torn in the middle of a line
    (folder / "report.html").unlink()
    for path in list((folder / "checkpoints").iterdir())[::2]:
        path.unlink()
    done = here("reproduce", "mnist", "--out", folder, "--resume", "--workers", 1)
    assert done.code == 0, done.error
    assert comparable(folder) == comparable(run)
    assert (folder / "report.html").exists()


@slow
@of_a_run
def test_the_same_command_gives_the_same_file(here, forking, run, tmp_path):
    folder = tmp_path / "again"
    assert here("reproduce", "mnist", *SMALL, "--out", folder, "--workers", 1).code == 0
    assert comparable(folder) == comparable(run)


@slow
@of_a_run
def test_report_is_rebuilt_from_the_records_alone(here, run, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copy(run / "records.jsonl", folder)
    done = here("report", folder)
    assert done.code == 0, done.error
    assert done.out.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text() == (run / "report.html").read_text()


@pytest.fixture
def measured(tmp_path):
    """The folder of a run whose records are those of the documentation."""
    folder = tmp_path / "measured"
    folder.mkdir()
    shutil.copy(MEASURED, folder / "records.jsonl")
    (folder / "report.html").touch()
    return folder


def broken_folder(tmp_path: Path) -> Path:
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(b"no")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["reproduce", "mnist", "--data", "nowhere"], "no data set 'nowhere'"),
        (["reproduce", "mnist", "--data", "BROKEN"], "not an IDX file"),
        (["reproduce", "mnist", "--claims", "figure-2"], "no claim figure-2: choose from"),
        (["reproduce", "mnist", "--rate", "-1"], "--rate: Input should be greater than 0"),
        (["reproduce", "mnist", "--resume"], "no mnist run to resume"),
        (["reproduce", "mnist", "--resume", "--out", "nowhere"], "cannot read nowhere"),
        (["reproduce", "mnist", "--out", "RUN"], "add --resume"),
        (["reproduce", "mnist", "--out", "RUN", "--resume", "--rate", "0.2"], "--rate cannot change"),
        (["reproduce", "mnist", "--rate", "inf"], "--rate: Input should be a finite number"),
        (["report", "nowhere"], "nowhere"),
        (["report", "RUN/report.html"], "it is a file, name its folder"),
    ],
)
def test_errors_are_one_line_without_a_traceback(here, measured, tmp_path, arguments, says):
    places = {"BROKEN": str(broken_folder(tmp_path)), "RUN": str(measured)}
    done = here(*[places.get(a, a).replace("RUN/", f"{measured}/") for a in arguments], cwd=tmp_path)
    assert done.code == 1
    assert says in done.error
    assert done.error.startswith("error: ")
    assert len(done.error.splitlines()) == 1


@slow
@of_a_run
def test_a_full_disk_is_one_line_and_says_how_to_go_on(here, forking, run, tmp_path):
    folder = tmp_path / "run"
    limit = (run / "records.jsonl").stat().st_size // 3  # no file may grow beyond this

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [*COMMAND, "reproduce", "mnist", *map(str, SMALL), "--out", str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=fill,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert f"--out {folder} --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert here("reproduce", "mnist", "--out", folder, "--resume", "--workers", 1).code == 0
    assert comparable(folder) == comparable(run)


def test_claims_are_listed(here):
    done = here("reproduce", "mnist", "--claims", "list")
    assert done.code == 0
    names = [line.split()[0] for line in done.out.splitlines()]
    assert names == ["higher-rates", "initial-weights", "saturation", "regularization", "figure-1"]


def test_version(here):
    assert here("--version").out == f"batchnorm {metadata.version('batchnorm')}\n"
