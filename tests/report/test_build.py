import json
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm import report
from batchnorm.records import RecordError

from . import sample


@pytest.fixture
def run(tmp_path):
    sample.write(tmp_path / "run", [sample.RUN, sample.figure_1a(), sample.sweep(), *sample.VERDICTS])
    return tmp_path / "run"


def test_writes_the_page_and_every_figure(run):
    page = report.build(run)
    assert page == run / "report.html"
    assert "15.8×" in page.read_text(encoding="utf-8")
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    figures = {
        f"figures/{name}.{kind}" for name in ("figure-1a", "learning-rates") for kind in ("png", "svg")
    }
    assert names == {"records.jsonl", "report.html"} | figures


@pytest.mark.slow
def test_builds_the_same_files_again(run):
    report.build(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    report.build(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_keeps_the_old_page_when_the_new_one_cannot_be_written(run, monkeypatch):
    page = report.build(run)
    before = page.read_bytes()

    def full(path: Path, content: bytes):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            report.build(run)
    assert page.read_bytes() == before
    assert not list(run.rglob(".*"))


def test_a_last_line_cut_off_by_a_crash_is_passed_over(run):
    with (run / "records.jsonl").open("a") as file:
        file.write('{"kind": "verdict", "cla')
    assert "15.8×" in report.build(run).read_text(encoding="utf-8")


def change(run, number, **changes):
    file = run / "records.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | changes)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_torn_line_is_named(run):
    file = run / "records.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]) + "\n", encoding="utf-8")
    with pytest.raises(RecordError, match=r"records\.jsonl, line 2: .*JSON"):
        report.build(run)


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (1, {"kind": "poem"}, "line 1: "),
        (2, {"name": "../../outside"}, "line 2: chart.name"),
        (4, {"outcome": "perhaps"}, "line 4: verdict.outcome"),
    ],
)
def test_a_wrong_line_is_named(run, number, changes, message):
    change(run, number, **changes)
    with pytest.raises(RecordError, match=message):
        report.build(run)


def test_a_line_of_unequal_lengths_is_named(run):
    panel = sample.figure_1a().panels[0].model_dump()
    panel["lines"][0]["y"].pop()
    change(run, 2, panels=[panel])
    with pytest.raises(RecordError, match=r"line 2: .*y has 16 values, x has 17"):
        report.build(run)


def test_says_what_is_missing(tmp_path):
    with pytest.raises(RecordError, match="nowhere is not the folder of a run: there is no such folder"):
        report.build(tmp_path / "nowhere")
    with pytest.raises(RecordError, match=r"it has no records\.jsonl"):
        report.build(tmp_path)
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(RecordError, match="holds no records"):
        report.build(tmp_path)
    sample.write(tmp_path / "headless", [sample.VERDICTS[0]])
    with pytest.raises(RecordError, match=r"records\.jsonl: .*name no run"):
        report.build(tmp_path / "headless")
    with pytest.raises(RecordError, match="not the folder of a run"):
        report.build(tmp_path / "records.jsonl")


@pytest.mark.slow
def test_builds_without_torch_and_without_pyplot(run):
    script = (
        "import sys; from pathlib import Path; from batchnorm import report; report.build(Path(sys.argv[1]));"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(run)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").exists()
