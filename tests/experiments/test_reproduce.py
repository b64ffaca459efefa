"""The ImageNet experiments as a user meets them: the real command, small networks, real digits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchnorm.cli import main
from tests.interrupted import stopped_by_ctrl_c

COMMAND = [sys.executable, "-m", "batchnorm.cli", "reproduce"]
SMALL = ("--quick", "--steps", "50", "--data", "mnist-10k", "--width", "0.05")
NARROW = os.environ | {"COLUMNS": "80"}


def reproduce(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=NARROW,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def networks(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each network recorded, but for the clock."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records(folder):
        if record["kind"] in ("evaluation", "result"):
            found.setdefault(record["job"], []).append({k: v for k, v in record.items() if k != "seconds"})
    return found


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "imagenet"
    done = reproduce("imagenet", *SMALL, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


FIVE = ["inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid"]


def test_imagenet_ends_with_the_verdict_on_figure_3(imagenet):
    folder, said = imagenet
    found = records(folder)
    head, *_, failures, figure_3 = found
    assert (head["kind"], head["experiment"]) == ("run", "imagenet")
    assert (head["config"]["scale"], head["config"]["steps"]) == ("quick", 50)
    assert (failures["kind"], failures["claim"]) == ("verdict", "failures")
    assert (figure_3["kind"], figure_3["claim"]) == ("verdict", "figure-3")
    assert {failures["outcome"], figure_3["outcome"]} <= {"seen", "not seen here"}
    assert "on mnist-10k and not on ImageNet" in figure_3["measured"]
    wanted = {f"{name}-seed0" for name in (*FIVE, "inception-x5", "inception-sigmoid")}
    assert networks(folder).keys() == wanted
    assert {r["steps"] for r in found if r["kind"] == "result"} == {10, 50}
    assert (folder / "figures" / "figure-2.png").stat().st_size > 5_000
    (chart,) = [record for record in found if record["kind"] == "chart"]
    assert len(chart["panels"][0]["lines"]) == 5
    page = (folder / "report.html").read_text()
    for title in ("Every network", "BN-x5-Sigmoid", "31.0e6", "scaled down"):
        assert title in page
    for words in ("BN-Baseline", "72.2 %", "31.0e6", "report.html"):
        assert words in said


def test_the_terminal_keeps_to_80_columns_and_every_number_to_its_line(imagenet):
    lines = imagenet[1].splitlines()
    ours = [line for line in lines if str(imagenet[0]) not in line]
    assert max(map(len, ours)) <= 80
    assert not any("…" in line for line in ours)
    assert not any(line.strip().startswith("%") for line in ours)


def test_stopped_by_ctrl_c_and_continued_it_gives_the_same_records(imagenet, tmp_path):
    folder = tmp_path / "stopped"
    rest, errors = stopped_by_ctrl_c(
        *COMMAND, "imagenet", *SMALL, "--claims", "failures", "--out", folder, env=NARROW
    )
    assert f"batchnorm reproduce imagenet --out {folder} --resume" in " ".join(rest.split())
    assert errors == ""
    assert (folder / "report.html").exists()
    assert records(folder)[-1]["outcome"] == "incomplete"
    whole = networks(imagenet[0])
    before = networks(folder)
    assert len(before) < 4
    for job, lines in before.items():
        assert lines == whole[job][: len(lines)]
    done = reproduce("imagenet", "--out", folder, "--resume")
    assert done.returncode == 0, done.stderr
    after = networks(folder)
    assert after == {job: whole[job] for job in after}
    assert len(after) == 4
    verdict, expected = records(folder)[-1], records(imagenet[0])[-2]
    assert verdict["claim"] == "failures"
    assert verdict == expected


def test_ensemble_ends_with_figure_4(tmp_path):
    folder = tmp_path / "ensemble"
    done = reproduce("ensemble", *SMALL, "--images", 2, "--out", folder)
    assert done.returncode == 0, done.stderr
    verdict = records(folder)[-1]
    assert (verdict["kind"], verdict["claim"]) == ("verdict", "ensemble")
    assert verdict["outcome"] in ("seen", "not seen here")
    (table,) = verdict["tables"].values()
    assert [row[0] for row in table["rows"]] == [
        *(f"network {number}" for number in range(1, 7)),
        "ensemble of all six",
        "paper: one network",
        "paper: ensemble",
    ]
    jobs = [f"member-{number}{what}" for number in range(1, 7) for what in ("", "-144-crops")]
    found = networks(folder)
    assert sorted(found) == sorted(jobs)
    for number, row in enumerate(table["rows"][:6], 1):
        accuracy = found[f"member-{number}-144-crops"][-1]["accuracy"]
        assert row[3] == f"{100 * accuracy:.2f} %"
        assert accuracy in [0.0, 0.5, 1.0]
    assert "144 crops" in done.stdout
    assert "ensemble of all six" in (folder / "report.html").read_text()


def here(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """The same command in this process, which has imported torch already: exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["batchnorm", "reproduce", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    out, errors = capsys.readouterr()
    return code if isinstance(code, int) else 0, out, errors


def test_claims_are_listed(monkeypatch, capsys):
    code, out, _ = here(monkeypatch, capsys, "imagenet", "--claims", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["ablation", "failures", "figure-3"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["imagenet", "--claims", "figure-4"], "no claim figure-4: choose from ablation, failures, figure-3"),
        (["imagenet", "--data", "nowhere"], "no data set 'nowhere'"),
        (["imagenet", "--quick", "--width", "-1"], "--width: Input should be greater than 0"),
        (["imagenet", "--out", "RUN"], "add --resume"),
        (["imagenet", "--out", "RUN", "--resume", "--steps", "70"], "--steps cannot change"),
        (["imagenet", "--out", "RUN", "--resume", "--claims", "ablation"], "--claims cannot change"),
        (["ensemble", "--resume"], "no ensemble run to resume"),
        (["ensemble", "--out", "RUN", "--resume"], "holds a run of imagenet"),
    ],
)
def test_errors_are_one_line_without_a_traceback(imagenet, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    filled = [str(imagenet[0]) if word == "RUN" else word for word in arguments]
    code, out, errors = here(monkeypatch, capsys, *filled)
    assert code == 1
    assert says in errors
    assert len(errors.splitlines()) == 1
    assert "Traceback" not in out + errors
