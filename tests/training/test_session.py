"""`batchnorm train`: stopped, killed, out of room, handed broken files, and on two machines; real files and processes.

What does not need a process of its own calls the command here, where torch is imported already.
"""

import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from batchnorm import cli
from batchnorm.data.catalogue import load
from batchnorm.data.crops import single_crop
from batchnorm.data.idx import DataError
from batchnorm.records import RecordFile
from batchnorm.training import checkpoint, toml
from batchnorm.training.checkpoint import CheckpointError, Checkpoints
from batchnorm.training.interruption import Interruption
from batchnorm.training.network import build
from batchnorm.training.score import Score
from batchnorm.training.trainer import Trainer
from tests.command import COMMAND, Done, Here
from tests.data.pictures import encoded, image_folder, picture
from tests.forked import Forked
from tests.mutations.mutation import Mutation
from tests.training.tiny import TINY

pytestmark = pytest.mark.slow
with_whole = pytest.mark.xdist_group("a whole run of train")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
RUN = """
[model]
width = 0.05
stem = "small"
dropout = 0.3

[data]
image_size = 16
distortion = "reduced"

[optimizer]
rate = 0.05
decay = 0.9
decay_every = 7

[training]
steps = 24
batch_size = 8
micro_batch = 3
ema = 0.9
patience = 50

[evaluation]
every = 6
images = 60
batch_size = 4
population_batches = 3

[checkpoints]
every_seconds = 0.05

[machine]
device = "cpu"
threads = 1
"""
QUICK = (  # for what is the same however long it trains
    "training.steps=2",
    "training.ema=0.5",
    "training.micro_batch=8",
    "evaluation.every=1",
    "evaluation.images=20",
    "evaluation.batch_size=20",
    "machine.keep_memory=false",
)


STARTED: "list[subprocess.Popen[str]]" = []


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:  # a test failed
            for pid in (*children(process), process.pid):
                os.kill(pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(autouse=True)
def _precision_may_change():
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def run_toml(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(RUN)
    return path


@pytest.fixture
def train(here: Here):
    """The command in this process, to be called with its arguments."""

    def call(*arguments: object) -> Done:
        AcceleratorState._reset_state(True)
        return here("train", *arguments)

    return call


def changed(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def start(*arguments: object, launcher: tuple[object, ...] = ()) -> "subprocess.Popen[str]":
    """The command in processes of its own, a group of theirs."""
    command = [*COMMAND, "train", *map(str, arguments)]
    if launcher:
        command = [sys.executable, "-m", "torch.distributed.run", *map(str, launcher), *command[1:]]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


def train_in_process(signal_after: tuple[int, signal.Signals] | None, *arguments: str) -> None:
    if signal_after is not None:
        last, number = signal_after
        # SIGINT goes to the whole group, as from a terminal
        send = os.killpg if number == signal.SIGINT else os.kill
        target = os.getpid()  # which leads its group
        after_each_step(pytest.MonkeyPatch(), lambda step: send(target, number) if step == last else None)
    sys.argv = ["batchnorm", "train", *arguments]
    cli.main()


def after_each_step(patch: pytest.MonkeyPatch, then: Callable[[int], None]) -> None:
    """Have `then` called with the training's step after each, and after each part of an evaluation."""
    from batchnorm.training.progress_bar import Bar

    on_step = Bar.on_step

    def step(bar: Any, trainer: Any) -> None:
        on_step(bar, trainer)
        then(trainer.step)

    patch.setattr(Bar, "on_step", step)


def fork(told: Path, *arguments: object, signal_after: tuple[int, signal.Signals] | None = None) -> Forked:
    """The command in a process of its own that starts in no time; what it says goes to the file `told`."""
    return Forked(train_in_process, signal_after, *map(str, arguments), out=told, env=ENVIRONMENT)


def children(process: "subprocess.Popen[str]") -> list[int]:
    """The ranks that torchrun has started, each in a session of its own."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def wait_for(process: "subprocess.Popen[str]", word: str) -> None:
    """Until it has printed a line with `word`."""
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(f"ended without {word!r}: {process.communicate()[1]}")


def end(process: "subprocess.Popen[str]") -> Done:
    out, error = process.communicate(timeout=200)
    return Done(process.returncode, out, error)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The records, without clock and command; of the configuration not where it ran."""
    found = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in line.items()
            if name not in ("seconds", "started", "command", "config")
        }
        for line in found
    ]


def state(path: Path) -> dict[str, Any]:
    found = checkpoint.load(path)
    assert found is not None
    return found


def newest(folder: Path) -> Path:
    path = Checkpoints(folder / "checkpoints", 1).newest
    assert path is not None
    return path


def differs(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two states differ by a bit or more."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            place
            for name in {**one, **other}
            for place in differs(one.get(name), other.get(name), f"{where}.{name}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            place
            for at, pair in enumerate(zip(one, other, strict=True))
            for place in differs(*pair, f"{where}[{at}]")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        equal = one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
        return [] if equal else [where]
    return [] if one == other else [where]


def assert_same_run(one: Path, other: Path) -> None:
    """The same records, and the same bits in every file of weights."""
    assert lines(one) == lines(other)
    for name in (newest(one).name, "best.pt", "final.pt"):
        states = [state(folder / "checkpoints" / name) for folder in (one, other)]
        for each in states:
            each["config"].pop("machine")
            each["config"].pop("checkpoints")
            each.pop("seconds", None)
            each.pop("result", None)  # it stands in the records, without its seconds
        assert differs(states[0], states[1]) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run_toml):
    """A run that nobody disturbed, and that saved less often."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = fork(
        folder.with_suffix(".out"), run_toml, "--out", folder, "--set", "checkpoints.every_seconds=1"
    )
    assert process.join() == 0, process.err
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory, run_toml):
    folder = tmp_path_factory.mktemp("runs") / "quick"
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        command = ["batchnorm", "train", str(run_toml), "--out", str(folder), *changed(*QUICK)]
        patch.setattr(sys, "argv", command)
        AcceleratorState._reset_state(True)
        cli.main()
    assert lines(folder)[-1]["kind"] == "result"
    return folder


@pytest.fixture
def copy(quick, tmp_path):
    return Path(shutil.copytree(quick, tmp_path / "copy"))


# ---- killed


def train_and_kill(folder: Path, run_toml: Path, whole: Path, kills: int, seed: int) -> None:
    """Train to the end, killed so many times on the way; a run that ends sooner is followed by another."""
    chance, killed, numbers = random.Random(seed), 0, itertools.count()
    while killed < kills:
        told = folder.with_name(f"{folder.name}-told-{next(numbers)}")
        process = fork(told, run_toml, "--out", folder, "--resume")  # begins where nothing has begun
        if killed % 2 == 0:  # at any moment, many of which are in the start
            process.join(chance.uniform(0, 2))
        else:  # in training, evaluating or saving
            process.wait_for("parameters")
            time.sleep(chance.uniform(0, 0.4))
        process.kill()
        code = process.join()
        assert process.err == ""
        for path in (folder / "checkpoints").glob("*.pt"):
            state(path)  # whole
        if code == 0:
            assert_same_run(folder, whole)
            shutil.rmtree(folder)
        else:
            assert code == -signal.SIGKILL
            killed += 1
    process = fork(folder.with_suffix(".last"), run_toml, "--out", folder, "--resume")
    assert process.join() == 0, process.err
    assert_same_run(folder, whole)
    assert list((folder / "checkpoints").glob("step-*.unfinished")) == []


@with_whole
def test_killed_20_times_at_random_moments_it_ends_with_the_same_bits(whole, run_toml, tmp_path):
    """KILLS=200 kills it more often."""
    kills = int(os.environ.get("KILLS", "20")) // 2
    with ThreadPoolExecutor(2) as lanes:  # two runs, as a start takes seconds
        jobs = [
            lanes.submit(train_and_kill, tmp_path / f"{seed}", run_toml, whole, kills, seed)
            for seed in (1, 2)
        ]
        for job in jobs:
            job.result()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path = tmp_path / "step.pt"
    checkpoint.save({"step": 1}, path)
    before, seen = path.read_bytes(), []
    fsync = os.fsync

    def forced(descriptor: int) -> None:
        seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.read_bytes() == before))
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file is meant")
    monkeypatch.setattr(os, "fsync", forced)
    checkpoint.save({"step": 2}, path)
    assert seen == [(str(path.with_suffix(".unfinished")), True), (str(tmp_path), False)]
    assert [each.name for each in tmp_path.iterdir()] == ["step.pt"]


def test_the_newest_are_kept_and_a_killed_run_s_remains_are_not(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / "best.pt").touch()
    (tmp_path / "step-000000003.unfinished").touch()
    for step in (5, 70, 1_000_000_000, 999_999_999):
        checkpoints.save({"step": step}, step)
    assert [state(path)["step"] for path in checkpoints.paths()] == [999_999_999, 1_000_000_000]
    assert {path.name for path in tmp_path.iterdir()} == {
        "best.pt",
        "step-999999999.pt",
        "step-1000000000.pt",
    }


# ---- stopped


@with_whole
def test_stopped_twice_it_goes_on_with_the_same_bits(train, whole, run_toml, tmp_path):
    folder = tmp_path / "stopped"
    process = fork(tmp_path / "first", run_toml, "--out", folder, signal_after=(8, signal.SIGTERM))
    assert (process.join(), process.err) == (75, "")
    assert f"batchnorm train --out {folder} --resume" in process.out
    stopped = state(newest(folder))["step"]
    assert 8 <= stopped < 15
    process = fork(tmp_path / "second", "--out", folder, "--resume", signal_after=(15, signal.SIGINT))
    assert (process.join(), process.err) == (130, "")
    assert 15 <= state(newest(folder))["step"] < 24
    done = train("--out", folder, "--resume", "--set", "machine.keep_memory=false")
    assert done.code == 0, done.error
    assert_same_run(folder, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_an_evaluation_the_checkpoint_is_from_before_it(
    train, run_toml, tmp_path, monkeypatch, number
):
    parts: list[int] = []

    def send_signal(step: int) -> None:
        parts.append(step)
        if parts.count(2) == 4:  # the step, and then parts of its evaluation
            os.kill(os.getpid(), number)

    after_each_step(monkeypatch, send_signal)
    quick = changed(*QUICK, "evaluation.every=2", "evaluation.batch_size=2", "training.steps=4")
    done = train(run_toml, "--out", tmp_path / "run", *quick)
    assert done.code == {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
    assert parts == [1, 2, 2, 2, 2]
    stopped = state(newest(tmp_path / "run"))
    assert (stopped["step"], stopped["evaluations"]) == (2, [])
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", [])
    assert train("--out", tmp_path / "run", "--resume").code == 0
    assert [line["step"] for line in lines(tmp_path / "run")[1:-1]] == [2, 4]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_stopped_while_it_starts_it_leaves_with_the_same_codes(run_toml, tmp_path, number, code):
    process = start(run_toml, "--out", tmp_path / "run")
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        pytest.skip("needs /proc to see when torch is imported")
    while "libtorch_cpu" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    done = end(process)
    assert done.code == code, done
    assert "Traceback" not in done.error
    assert not (tmp_path / "run").exists()


def test_a_second_signal_raises_and_a_duplicate_does_not(monkeypatch):
    signals: list[signal.Signals] = []
    with Interruption(signals.append) as interruption:
        try:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            pytest.fail("what torchrun says again is no second request")
        assert (interruption.received, signals) == (signal.SIGTERM, [signal.SIGTERM])
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# ---- what is in the folder


@with_whole
def test_records_events_checkpoints_and_a_page(whole):
    kinds = [line["kind"] for line in lines(whole)]
    assert kinds == ["run", *["evaluation"] * 4, "result"]
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names[:2] == ["best.pt", "final.pt"]
    assert 2 < len(names) <= 2 + 3
    assert names[-1] == "step-000000024.pt"
    assert (whole / "report.html").stat().st_size > 5000
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    written = (
        events.EventAccumulator(str(whole / "tensorboard" / "network")).Reload().Scalars("accuracy/test")
    )
    expected = [(line["step"], line["accuracy"]) for line in lines(whole) if line["kind"] == "evaluation"]
    assert [(event.step, pytest.approx(event.value)) for event in written] == expected


def accuracy(saved: dict[str, Any], statistics: str) -> float:
    config = toml.parse(saved["config"])
    network = build(config, saved["classes"], saved["channels"]).eval()
    network.load_state_dict(saved[statistics])
    source = load(config.data.source, "val")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    chosen = [source[int(at)] for at in order[: config.evaluation.images]]
    crop = single_crop(config.data.image_size)
    with torch.no_grad():
        found = network(torch.stack([crop(image) for image, _ in chosen])).argmax(1)
    return float((found == torch.tensor([label for _, label in chosen])).double().mean())


@with_whole
def test_best_is_the_network_of_the_best_evaluation_and_final_that_of_the_end(whole):
    evaluations = [line for line in lines(whole) if line["kind"] == "evaluation"]
    best, final = (state(whole / "checkpoints" / f"{name}.pt") for name in ("best", "final"))
    # of several the first; on some processors it is the last of all, and then `best` and `final` are one network
    top = max(evaluations, key=lambda line: line["accuracy"])
    assert (best["step"], accuracy(best, "population")) == (top["step"], top["accuracy"])
    result = lines(whole)[-1]
    assert final["step"] == 24
    assert accuracy(final, "population") == result["accuracy"] == evaluations[-1]["accuracy"]
    assert accuracy(final, "moving") == result["accuracy_moving"]
    assert differs(final["moving"], state(newest(whole))["model"]) == []


def test_best_is_not_the_last_where_an_earlier_evaluation_was_better(train, run_toml, tmp_path, monkeypatch):
    def score(trainer: Trainer, _: object) -> Generator[None, None, Score]:
        yield None
        return Score(10, {1: 1, 2: 4, 3: 4, 4: 2}[trainer.step], 10)

    monkeypatch.setattr(Trainer, "_evaluate_accuracy", score)
    quick = changed(*QUICK, "training.steps=4")
    assert train(run_toml, "--out", tmp_path / "run", *quick).code == 0
    best, final = (state(tmp_path / "run" / "checkpoints" / f"{name}.pt") for name in ("best", "final"))
    assert (best["step"], final["step"]) == (2, 4)  # of equal ones the first


def test_a_completed_run_that_is_continued_changes_nothing_but_its_page(train, copy):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.suffix in (".pt", ".jsonl")}
    (copy / "report.html").unlink()
    done = train("--out", copy, "--resume")
    assert (done.code, done.error) == (0, "")
    assert {path: path.read_bytes() for path in before} == before
    assert (copy / "report.html").exists()


def test_records_that_were_lost_come_back_from_the_checkpoint(train, copy, quick):
    path = copy / "records.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text(kept[0] + kept[1][:40])
    newest(copy).unlink()
    shutil.copy(quick / "checkpoints" / "step-000000001.pt", copy / "checkpoints")
    path.write_text(kept[0] + kept[1][:40])  # torn in the first evaluation
    assert train("--out", copy, "--resume").code == 0
    assert lines(copy) == lines(quick)


# ---- what is wrong with a checkpoint


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def flip(path: Path) -> None:
    """A bit in the middle of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda each: each.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


BROKEN: dict[str, tuple[Any, str]] = {
    "empty": (lambda path, _: cut(path, 0), "is broken: delete it to resume from the previous one"),
    "truncated": (lambda path, _: cut(path, path.stat().st_size // 2), "is broken: delete it"),
    "one byte short": (lambda path, _: cut(path, path.stat().st_size - 1), "is broken: delete it"),
    "a bit flipped": (lambda path, _: flip(path), "is broken: delete it"),
    "noise": (lambda path, _: path.write_bytes(os.urandom(5000)), "is broken: delete it"),
    "code": (lambda path, _: torch.save({"config": Code()}, path), "is broken: delete it"),
    "weights alone": (lambda path, whole: torch.save(whole["model"], path), "other settings: delete it"),
    "a tensor": (lambda path, _: torch.save(torch.zeros(3), path), "is broken: delete it"),
    "of another width": (
        lambda path, whole: torch.save(
            {**whole, "config": {**whole["config"], "model": {**whole["config"]["model"], "width": 0.1}}},
            path,
        ),
        "other settings",
    ),
    "of the digits": (lambda path, _: torch.save(digits_state(), path), "other settings"),
    "best.pt renamed": (
        lambda path, _: shutil.copy(path.with_name("best.pt"), path),
        "does not fit the network: delete it",
    ),
    "of other classes": (
        lambda path, whole: torch.save(
            {**whole, "model": {**whole["model"], "classifier.weight": torch.zeros(7, 51)}}, path
        ),
        "does not fit the network",
    ),
}


def digits_state() -> dict[str, Any]:
    from batchnorm.training.digits_trainer import Training, digits_trainer

    settings = Training(batch_norm=True, rate=0.1, steps=2, seed=0)
    return digits_trainer("mnist-10k", settings, "job", Path()).state_dict()


@pytest.mark.parametrize("how", BROKEN)
def test_a_checkpoint_that_cannot_be_used_is_one_line_and_stays(train, copy, how, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spoil, says = BROKEN[how]
    path = newest(copy)
    spoil(path, state(path))
    content, records = path.read_bytes(), (copy / "records.jsonl").read_bytes()
    done = train("--out", copy, "--resume")
    assert done.code == 1
    assert done.error.startswith("error: ") and len(done.error.splitlines()) == 1
    assert str(path) in done.error
    assert says in done.error
    assert path.read_bytes() == content
    assert (copy / "records.jsonl").read_bytes() == records
    assert not (tmp_path / "executed").exists()
    if how in ("truncated", "of another width"):  # what to do, done
        path.unlink()
        assert train("--out", copy, "--resume").code == 0


def test_a_flipped_bit_anywhere_is_found_or_of_no_consequence(quick, tmp_path):
    whole, chance = newest(quick).read_bytes(), random.Random(1)
    expected, path, found = state(newest(quick)), tmp_path / "step.pt", 0
    for _ in range(60):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            assert differs(state(path), expected) == []  # padding, a date
        except CheckpointError:
            found += 1
    assert found > 20


# ---- no room, no permission, no numbers


def test_a_file_in_place_of_the_folder(train, run_toml, tmp_path):
    (tmp_path / "run").write_text("a file")
    done = train(run_toml, "--out", tmp_path / "run" / "below", *changed(*QUICK))
    assert done.code == 1
    assert "run" in done.error and len(done.error.splitlines()) == 1
    assert (tmp_path / "run").read_text() == "a file"


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A file system of 2 MB, where this may be done."""
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], check=False).returncode
    ):
        pytest.skip("only root may mount a file system to fill")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_and_one_that_is_read_only(train, run_toml, tmp_path):
    with mounted(tmp_path / "disk") as disk:
        done = train(run_toml, "--out", disk / "run", *changed(*QUICK, "checkpoints.keep=1"))
        if done.code == 0:  # it fits; one that is started beside it will not
            (disk / "ballast").write_bytes(bytes(200_000))
        before = state(newest(disk / "run"))
        assert before["step"] <= 2
        full = train(run_toml, "--out", disk / "another", *changed(*QUICK))
        assert full.code == 1
        assert "No space left on device" in full.error and str(disk / "another") in full.error
        assert len(full.error.splitlines()) == 1
        assert list((disk / "another").rglob("*.unfinished")) == []
        for path in disk.rglob("*.pt"):
            state(path)  # whole
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = train(run_toml, "--out", disk / "third", *changed(*QUICK))
        assert done.code == 1
        assert "Read-only file system" in done.error
        assert len(done.error.splitlines()) == 1
        subprocess.run(["mount", "-o", "remount,rw,size=20m", disk], check=True)
        resume = ["--resume"] * (disk / "another" / "records.jsonl").exists()
        assert train(run_toml, "--out", disk / "another", *changed(*QUICK), *resume).code == 0


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(train, copy):
    """Where no file may grow beyond a size, as with a quota."""
    for path in (copy / "checkpoints").iterdir():
        if path.name != "step-000000001.pt":
            path.unlink()
    before = (copy / "checkpoints" / "step-000000001.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 3, limits[1]))
    try:
        done = train("--out", copy, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code == 1
    assert "File too large" in done.error and str(copy) in done.error and "--resume" in done.error
    assert len(done.error.splitlines()) == 1
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step-000000001.pt"]
    assert (copy / "checkpoints" / "step-000000001.pt").read_bytes() == before
    assert train("--out", copy, "--resume").code == 0


@pytest.mark.filterwarnings("ignore:.*saw a batch whose mean or variance is inf or nan")
def test_a_loss_that_is_no_number_ends_the_run_and_names_the_last_good_checkpoint(train, run_toml, tmp_path):
    folder = tmp_path / "run"
    settings = changed(
        *QUICK,
        "optimizer.rate=1e30",
        "training.steps=9",
        "evaluation.every=3",
        "checkpoints.every_seconds=1e-9",
    )
    for arguments in ([run_toml, *settings], ["--resume"]):
        done = train("--out", folder, *arguments)
        assert done.code == 1
        assert re.search(r"the loss became (nan|inf) by step 3.*lower optimizer\.rate", done.error)
        assert done.error.count("\n") == 1
        assert str(newest(folder)) in done.error
        good = state(newest(folder))
        assert good["step"] == 1
        assert all(value.isfinite().all() for value in good["model"].values())
        assert not (folder / "checkpoints" / "best.pt").exists()


# ---- data with holes


def test_images_that_cannot_be_read_are_named_and_too_many_stop_the_run(train, run_toml, tmp_path):
    data = image_folder(tmp_path / "data", train=8, val=6)
    broken = [data / "train" / "cat" / "03.jpg", data / "val" / "dog" / "02.jpg"]
    for path in broken:
        path.write_bytes(b"no picture")
    quick = changed(*QUICK, f"data.source={data}", "model.name=resnet18", "checkpoints.every_seconds=600")
    own = tmp_path / "own.toml"
    own.write_text(
        "[model]\nname = 'resnet18'\n" + RUN.split("dropout = 0.3\n")[1].replace("micro_batch = 3", "")
    )
    done = train(own, "--out", tmp_path / "run", *quick, "--set", "data.corrupt_share=0.1")
    assert done.code == 0, done.error
    for path in broken:
        assert done.out.count(f"skipped an image that cannot be read, {path}: ") == 1, done.out
    done = train(own, "--out", tmp_path / "strict", *quick)
    assert done.code == 1
    assert "cat/03.jpg" in done.error and "corrupt_share" in done.error
    assert len(done.error.splitlines()) == 1


# ---- the command


def test_the_example_is_a_configuration(train, tmp_path):
    done = train("--example")
    (tmp_path / "run.toml").write_text(done.out)
    config = toml.read(tmp_path / "run.toml")
    assert config.model.name == "bn-inception"
    assert config.model.name == "bn-inception"


def test_a_dry_run_takes_a_step_and_prints_a_run_toml(train, run_toml, tmp_path):
    (tmp_path / "run.toml").write_text(RUN)
    dry = train(
        tmp_path / "run.toml", "--dry-run", "--out", tmp_path / "none", "--set", "optimizer.rate=0.125"
    )
    assert (dry.code, dry.error) == (0, "")
    assert not (tmp_path / "none").exists()
    assert re.search(
        r"^# [\d,]+ parameters; 8,000 training and 60 validation images in 10 classes$", dry.out, re.M
    )
    assert re.search(r"^# one step: loss \d\.\d{4}, [\d.]+ s; 24 of them about", dry.out, re.M)
    (tmp_path / "printed.toml").write_text(dry.out)
    assert toml.read(tmp_path / "printed.toml") == toml.read(run_toml, ["optimizer.rate=0.125"])
    assert train(tmp_path / "printed.toml", "--dry-run").code == 0


def test_a_dry_run_finds_what_a_run_would_fail_of(train, run_toml, tmp_path):
    for change, says in (
        ("data.source=nowhere", "no data set 'nowhere'"),
        ("model.name=resnet18", "of a model of torchvision or timm"),
        ("model.weights=absent.pth", "there is no such file"),
        ("training.batch_size=9000", "do not fill one batch"),
    ):
        done = train(run_toml, "--dry-run", "--set", change)
        assert done.code == 1 and says in done.error, change
    assert train(run_toml, "--dry-run", "--data", "nowhere").error == done_of_nowhere()


def done_of_nowhere() -> str:
    with pytest.raises(DataError) as caught:
        load("nowhere", "train")
    return f"error: {caught.value}\n"


def test_a_key_of_the_file_can_be_left_out(train, run_toml):
    leave_out = changed("model.name=resnet18", "model.width=", "model.stem=", "data.image_size=32")
    done = train(run_toml, "--dry-run", *leave_out)
    assert done.code == 1 and "resnet18 takes images of 3 channels, these have 1" in done.error


def test_a_recipe_says_what_it_changes(train, run_toml, tmp_path):
    done = train(run_toml, "--recipe", "bn-x5", "--without", "2", "--dry-run", "--out", tmp_path / "none")
    assert done.code == 0
    changes = [line for line in done.out.splitlines() if line.startswith("# ")]
    assert any("optimizer.rate = 0.05 → 0.25" in line for line in changes)
    assert any("left out" in line for line in changes)
    assert len(changes) >= 7
    assert tomllib.loads(done.out)["optimizer"]["rate"] == 0.25
    assert train(run_toml, "--recipe", "bn-x6", "--dry-run").code == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["RUN.TOML", "--set", "model.widht=1"], "did you mean width"),
        (["RUN.TOML", "--set", "trainig.steps=1"], "did you mean training"),
        (["nowhere.toml"], "cannot read nowhere.toml"),
        ([], "name a run.toml"),
        (["RUN.TOML", "--out", "QUICK"], "holds a run already: add --resume"),
        (["--resume"], "no train run to resume"),
        (["--resume", "--out", "nowhere"], "name a run.toml"),
        (["--resume", "--out", "EMPTY"], "name a run.toml"),
        (["RUN.TOML", "--without", "2"], "--recipe"),
        (["--resume", "--out", "QUICK", "--set", "optimizer.rate=0.2"], "optimizer.rate cannot change"),
        (["--resume", "--out", "QUICK", "RUN.TOML"], "training.steps"),
        (["--resume", "--out", "QUICK", "--recipe", "bn-x5"], "optimizer.decay_every cannot change"),
        (["RUN.TOML", "--set", "training.precision=float16"], 'take "bfloat16"'),
        (["RUN.TOML", "--set", "data.source=nowhere"], "no data set 'nowhere'"),
        (["RUN.TOML", "--set", "training.batch_size=9000"], "do not fill one batch"),
        (["RUN.TOML", "--set", 'model.per_activation=["9z"]'], "9z"),
    ],
)
def test_errors_are_one_line(train, run_toml, quick, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "records.jsonl").touch()  # killed when it had just begun
    places = {"RUN.TOML": run_toml, "QUICK": quick, "EMPTY": tmp_path / "empty"}
    done = train(*[places.get(each, each) for each in arguments])
    assert done.code == 1
    assert done.error.startswith("error: ")
    assert says in done.error
    assert len(done.error.splitlines()) == 1


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_whose_run_was_killed_before_its_first_record_is_free(train, run_toml, tmp_path, resume):
    (tmp_path / "records.jsonl").write_text('{"kind": "ru')
    assert train(run_toml, "--out", tmp_path, *changed(*QUICK), *resume).code == 0
    assert [line["kind"] for line in lines(tmp_path)] == ["run", "evaluation", "evaluation", "result"]


def test_machine_and_checkpoints_may_change_when_a_run_is_continued(train, copy, run_toml):
    newest(copy).unlink()
    changes = changed(*QUICK, "machine.channels_last=false", "checkpoints.keep=1")
    assert train(run_toml, "--out", copy, "--resume", *changes).code == 0
    assert [path.name for path in Checkpoints(copy / "checkpoints", 1).paths()] == ["step-000000002.pt"]


def test_a_run_can_be_made_longer_and_ends_as_one_that_was_longer_from_the_beginning(
    train, copy, run_toml, tmp_path
):
    shutil.rmtree(copy / "figures")
    done = train("--out", copy, "--resume", "--set", "training.steps=5")
    assert done.code == 0, done.error
    assert train(run_toml, "--out", tmp_path / "whole", *changed(*QUICK, "training.steps=5")).code == 0
    (one,), (two,) = ([state(folder / "checkpoints" / "final.pt")] for folder in (copy, tmp_path / "whole"))
    assert differs(one["population"], two["population"]) == []
    records = [json.loads(line) for line in (copy / "records.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in records]
    assert kinds == ["run", "evaluation", "evaluation", "result", "run", *["evaluation"] * 3, "result"]
    assert [line["config"]["training"]["steps"] for line in records if line["kind"] == "run"] == [2, 5]
    assert records[-1]["steps"] == 5
    assert "right after 5 steps" in done.out
    again = train("--out", copy, "--resume")  # which is that longer run now
    assert again.code == 0 and "right after 5 steps" in again.out
    fewer = train("--out", copy, "--resume", "--set", "training.steps=3")
    assert fewer.code == 1 and "was trained for 5 steps: training.steps = 3 cannot be fewer" in fewer.error


def test_a_run_whose_schedule_ends_at_its_steps_cannot_be_made_longer(train, run_toml, tmp_path):
    cosine = changed(
        *QUICK, "optimizer.schedule=CosineAnnealingLR", "optimizer.decay=", "optimizer.decay_every="
    )
    assert train(run_toml, "--out", tmp_path / "run", *cosine).code == 0
    done = train("--out", tmp_path / "run", "--resume", "--set", "training.steps=5")
    assert done.code == 1
    assert (
        "training.steps cannot change when a run is resumed (CosineAnnealingLR ends at training.steps), only [machine] "
        "and [checkpoints] can" in done.error
    )


def test_a_run_that_ended_by_patience_is_not_made_longer(train, run_toml, tmp_path):
    early = changed(*QUICK, "training.steps=9", "training.patience=1", "optimizer.rate=1e-12")
    assert train(run_toml, "--out", tmp_path / "run", *early).code == 0
    done = train("--out", tmp_path / "run", "--resume", "--set", "training.steps=20")
    assert done.code == 1 and re.search(r"ended after \d of 9 steps by training.patience", done.error)


@pytest.mark.parametrize("place", ["runs/own", "own", "elsewhere/own"])
def test_the_newest_run_is_found_where_out_put_it(train, copy, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mnist-1").mkdir(parents=True)
    (tmp_path / "runs" / "mnist-1" / "records.jsonl").write_text("nonsense\n")
    shutil.copytree(copy, tmp_path / place, dirs_exist_ok=True)
    shutil.rmtree(copy)
    records = tmp_path / place / "records.jsonl"
    stopped = "".join(records.read_text().splitlines(keepends=True)[:-1])  # before its result
    records.write_text(stopped)
    done = train("--resume")
    assert done.code == 0, done.error
    assert f"run folder  {place}" in done.out
    # now it is complete: in runs/ it may be made longer, elsewhere it may be anybody's records
    again = train("--resume")
    assert again.code == (0 if place.startswith("runs/") else 1), again.error


def test_the_number_of_threads_is_said_and_stays_that_of_the_run(train, run_toml, tmp_path, monkeypatch):
    from batchnorm.training import threads

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "free_cores", lambda: (1, "1 of 2 cores is free"))
    done = train(run_toml, "--out", tmp_path / "run", *changed(*QUICK, "machine.threads="))
    assert "threads     1, as 1 of 2 cores is free; machine.threads chooses" in done.out
    assert "1 process on cpu, 1 thread" in done.out
    head = json.loads((tmp_path / "run" / "records.jsonl").read_text().splitlines()[0])
    assert head["config"]["machine"]["threads"] == 1
    monkeypatch.setattr(threads, "free_cores", lambda: pytest.fail("was asked again"))
    assert train("--out", tmp_path / "run", "--resume").code == 0
    assert (
        train(run_toml, "--out", tmp_path / "run", "--resume", *changed(*QUICK, "machine.threads=")).code == 0
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # somebody has chosen
    assert "threads  " not in train(run_toml, "--dry-run", *changed("machine.threads=")).out


def test_it_starts_from_weights_and_a_resumed_run_needs_them_no_more(train, run_toml, copy, tmp_path):
    weights = tmp_path / "best.pt"
    shutil.copy(copy / "checkpoints" / "best.pt", weights)
    changes = changed(*QUICK, f"model.weights={weights}", "optimizer.rate=1e-30", "training.steps=1")
    done = train(run_toml, "--out", tmp_path / "run", *changes)
    assert done.code == 0, done.error
    assert f"starting from {weights}" in done.out
    before, after = state(weights), state(tmp_path / "run" / "checkpoints" / "final.pt")
    for part in ("population", "average"):
        torch.testing.assert_close(
            after[part]["classifier.weight"], before["population"]["classifier.weight"], rtol=1e-5, atol=1e-6
        )
    weights.unlink()
    assert train("--out", tmp_path / "run", "--resume", "--set", "training.steps=2").code == 0
    assert "there is no such file" in train(run_toml, "--out", tmp_path / "new", *changes).error
    assert not (tmp_path / "new").exists()


def test_the_loss_of_a_check_begins_anew_at_an_evaluation():
    AcceleratorState._reset_state(True)
    each = Trainer(toml.parse(TINY, ["training.steps=120", "evaluation.every=70"]), "job")
    losses: list[float] = []
    train_step = each._train_step

    def step(batch: Any) -> None:
        before = float(each.loss_sum)
        train_step(batch)
        losses.append(float(each.loss_sum) - before)

    each._train_step = step  # type: ignore[method-assign]
    checks = {}
    for _ in each.run():
        if each.checked is not None:
            checks[each.checked.step] = each.checked.recent
    for first, last in ((0, 50), (50, 70), (70, 100), (100, 120)):
        expected = sum(losses[first:last]) / (last - first)
        assert checks[last] == pytest.approx(expected, rel=1e-3)


def test_names_that_are_no_utf_8_end_no_training(train, run_toml, tmp_path):
    root = image_folder(tmp_path / "pictures", train=40, val=3)
    for split in ("train", "val"):
        os.rename(os.fsencode(root / split / "dog"), os.fsencode(root / split) + b"/caf\xe9")
    (Path(os.fsdecode(os.fsencode(root / "val" / "cat") + b"/\xff.png"))).write_bytes(b"torn")
    changes = changed(*QUICK, "data.corrupt_share=0.5", "evaluation.images=")
    done = train(run_toml, "--data", root, "--out", tmp_path / "run", *changes)
    assert done.code == 0, done.error
    records = lines(tmp_path / "run")
    assert records[0]["classes"] == ["caf?", "cat"]
    assert records[-1]["unreadable"] == 1 and records[-1]["unreadable_images"][0].endswith("/?.png")
    assert train("--out", tmp_path / "run", "--resume").code == 0


def test_one_class_in_shards_is_nothing_to_tell_apart(train, run_toml, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for number in range(20):
                for name, content in (("jpg", encoded(picture(number))), ("cls", b"0")):
                    member = tarfile.TarInfo(f"{number:03}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    done = train(run_toml, "--data", tmp_path, "--out", tmp_path / "run")
    assert done.code == 1 and "has a single class: there is nothing to tell apart" in done.error


def test_tensorboard_has_losses_rate_speed_and_the_layers(train, run_toml, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    changes = changed(*QUICK, "training.steps=100", "evaluation.every=100", "training.patience=")
    assert train(run_toml, "--out", tmp_path / "run", *changes).code == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard" / "network")).Reload()
    tags = events.Tags()
    assert {"loss/train", "loss/validation", "accuracy/test"} <= {*tags["scalars"]}
    checks = events.Scalars("training/loss")
    assert [each.step for each in checks] == [50, 100]
    (evaluation,) = [line for line in lines(tmp_path / "run") if line["kind"] == "evaluation"]
    assert sum(each.value for each in checks) / 2 == pytest.approx(evaluation["loss"], rel=1e-4)
    assert [
        line["confusion"] is not None for line in lines(tmp_path / "run") if line["kind"] == "evaluation"
    ] == [True]
    assert events.Scalars("loss/validation")[0].value == pytest.approx(evaluation["loss_validation"])
    assert events.Scalars("training/learning rate")[0].value == pytest.approx(0.05 * 0.9**7)
    assert events.Scalars("training/images per second")[0].value > 0
    histograms = {tag.split("/")[0] for tag in tags["histograms"]}
    assert histograms == {"bn γ", "bn β", "bn running mean", "bn running variance"}


def test_two_runs_do_not_write_one_folder(train, copy):
    newest(copy).unlink()
    with RecordFile(copy / "records.jsonl"):
        done = train("--out", copy, "--resume")
    assert done.code == 1
    assert "is being written by another process" in done.error


# ---- several processes

SYNC = (
    "training.sync=true",
    "training.precision=float64",
    "training.ema=0.9",
    "training.micro_batch=8",
    "training.steps=16",
    "model.dropout=0",
    "model.activation=sigmoid",  # where ReLU's input is 0 but for rounding, its gradient is 0 or 1 by chance
    "evaluation.every=4",
    "evaluation.batch_size=2",  # slow enough to be stopped in time
)


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    return number


def test_two_ranks_then_two_machines_train_as_one_process_would(train, run_toml, tmp_path):
    alone, folder = tmp_path / "alone", tmp_path / "both"
    ranks = ("--nproc-per-node", 2, "--master-port", port())
    process = start(run_toml, "--out", folder, *changed(*SYNC), launcher=ranks)
    wait_for(process, "2 processes on cpu")
    wait_for(process, "step         4")
    told = (*children(process), process.pid)
    assert len(told) == 3
    for pid in told:  # as a scheduler does; the ranks hear it from the launcher as well
        os.kill(pid, signal.SIGTERM)
    stopped = time.monotonic()
    done = end(process)
    assert time.monotonic() - stopped < 25  # the launcher would kill them after 30
    assert "Resume with" in done.out, done
    assert list((folder / "checkpoints").glob("*.unfinished")) == []
    assert 4 <= state(newest(folder))["step"] < 16
    machines = ("--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "test")
    meet = ("--rdzv-endpoint", f"127.0.0.1:{port()}")
    agents = [start("--out", folder, "--resume", launcher=(*machines, *meet)) for _ in range(2)]
    assert train(run_toml, "--out", alone, *changed(*SYNC, "machine.keep_memory=false")).code == 0
    for agent in agents:
        done = end(agent)
        assert done.code == 0, done.error
    states = [state(newest(each)) for each in (folder, alone)]
    for part in ("model", "average"):
        for name, value in states[1][part].items():
            torch.testing.assert_close(
                states[0][part][name], value, rtol=1e-9, atol=1e-9, msg=f"{part}.{name}"
            )
    for one, two in zip(lines(alone), lines(folder), strict=True):
        for name, value in one.items():
            if isinstance(value, float):
                assert math.isclose(value, two[name], rel_tol=1e-9), name
            elif name != "data":
                assert value == two[name], name
    finals = [state(each / "checkpoints" / "final.pt") for each in (folder, alone)]
    for name, value in finals[1]["population"].items():
        torch.testing.assert_close(finals[0]["population"][name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_torchrun_ends_with_the_error_and_not_with_a_list_of_calls(run_toml, tmp_path):
    process = start(
        run_toml, "--out", tmp_path / "run", "--set", "data.source=nowhere",
        launcher=("--nproc-per-node", 2, "--master-port", port()),
    )  # fmt: skip
    done = end(process)
    assert done.code == 1
    last = "\n".join(done.error.splitlines()[-4:])
    assert "no data set 'nowhere': name a folder" in last
    assert "cli/train.py" not in done.error and "without_traceback" not in done.error


MUTATIONS = [
    Mutation(
        "a checkpoint written in place", "atomic_file.py",
        "        unfinished.replace(path)", "        path.write_bytes(unfinished.read_bytes())",
        "whoever is killed while it is written leaves half of one",
    ),
    Mutation(
        "checksums not looked at", "training/checkpoint.py",
        "archive.testzip() is not None", "False",
        "a flipped bit would be trained on",
    ),
    Mutation(
        "the diverged network may be best", "training/session.py",
        "if record.accuracy > best and not trainer.diverged:", "if record.accuracy > best:",
        "of weights that are no numbers",
    ),
]  # fmt: skip
