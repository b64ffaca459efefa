"""Tables, picture and page of results that were made up."""

import math

import pytest
from rich.console import Console

from batchnorm.bench import figure, results, table
from batchnorm.bench.rows import ResultsError, read
from tests.bench.sample import measured


def grid(titled, command="kernels"):
    (found,) = [grid for grid in table.grids(measured(command)) if titled in grid.title]
    return found


def test_a_table_of_layers():
    shown = grid("BN+ReLU against torch, NCHW, float32")
    assert shown.columns == [
        "shape", "pass", "copy", "ours", "±", "copies", "torch", "±", "copies", "torch/ours",
    ]  # fmt: skip
    assert shown.rows[0] == [
        "32×64×112×112", "forward", "10.0", "20.0", "0%", "2.00", "160", "0%", "16.0", "8.00×",
    ]  # fmt: skip
    # the means of 8 and 2, and of 2 and 2 copies
    assert shown.rows[-1] == [
        "geometric mean", "both", "", "", "", "6.00", "", "", f"{3 * math.sqrt(16 * 4):.1f}", "4.00×",
    ]  # fmt: skip


def test_who_was_missing_once_has_no_line_there():
    shown = grid("BN+ReLU against torch.compile, NCHW, float32")
    assert {row[0] for row in shown.rows} == {"32×64×112×112", "geometric mean"}
    assert shown.rows[0][-1] == "12.50×"


def test_a_table_of_networks():
    shown = grid("Networks, NCHW", "step")
    assert shown.rows[0] == [
        "resnet18", "200", "0%", "250", "0%", "1.25×", "1,500", "0%", "7.50×", "180", "0%", "0.90×",
    ]  # fmt: skip
    assert shown.rows[-1][5] == f"{math.sqrt(1.25 * 1.6):.2f}×"
    assert grid("Our settings", "step").rows == [["resnet18", "150", "0%", "300", "0%", "2.00×"]]


def test_a_table_of_statistics():
    shown = grid("Ghost(16), NCHW", "statistics")
    assert shown.columns == [
        "shape", "pass", "ours", "±", "copies", "plain", "/ours", "loop", "/ours", "timm", "/ours",
    ]  # fmt: skip
    assert shown.rows[0] == [
        "32×64×56×56", "forward", "10.0", "0%", "", "8.00", "0.80×", "30.0", "3.00×", "20.0", "2.00×",
    ]  # fmt: skip
    assert shown.rows[-1][2:] == ["12.0", "0%", "", "6.00", "0.50×", "48.0", "4.00×", "", ""]
    assert grid("virtual_batch", "statistics").rows == [
        ["32×3×64×64", "step", "400", "0%", "", "200", "0.50×", "300", "0.75×"]
    ]


@pytest.mark.parametrize("command", ["kernels", "step", "statistics", "scaling"])
def test_a_terminal_of_80_columns_shows_every_cell_on_one_line(command):
    console = Console(width=80, force_terminal=False)
    for shown in table.grids(measured(command)):
        with console.capture() as capture:
            console.print(table.render(shown))
        lines = capture.get().splitlines()
        assert len(lines) == 2 + len(shown.rows)
        assert "…" not in capture.get()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["kernels", "step", "statistics", "scaling"])
def test_the_same_results_give_the_same_picture(command):
    picture = figure.png(measured(command))
    assert picture.startswith(b"\x89PNG")
    assert picture == figure.png(measured(command))


@pytest.mark.slow
def test_a_folder_collects_the_commands_and_the_latest_of_each_counts(tmp_path):
    folder = tmp_path / "new" / "folder"
    results.write(measured("step"), folder)
    results.write(measured("kernels", finished=False), folder)
    assert "Stopped before the end" in (folder / "RESULTS.md").read_text()
    written = results.write(measured("kernels", compile_static=False), folder)
    text = written.read_text()
    assert "Stopped" not in text
    assert "against torch.compile" not in text
    assert text.index("## Layers in training") < text.index(
        "## Training steps"
    )  # in the order of the commands
    facts = [
        "batchnorm bench kernels",
        "2026-01-02, 03:04 UTC",
        "a processor, 2 cores",
        "2 threads",
        "torch 2.14.1",
    ]
    for fact in (*facts, "OMP_NUM_THREADS=2", "failed with InductorError", "| 32×64×112×112 | forward |"):
        assert fact in text
    for picture in ("kernels.png", "step.png"):
        assert f"]({picture})" in text
        assert (folder / picture).exists()
    assert read(folder / "step.json") == measured("step")


def test_results_of_nothing_are_a_page_without_a_picture(tmp_path):
    nothing = measured().model_copy(update={"rows": [], "finished": False})
    assert "Stopped" in results.write(nothing, tmp_path).read_text()
    assert not (tmp_path / "kernels.png").exists()


@pytest.mark.parametrize("content", ["{}", "not json"])
def test_a_file_of_something_else_is_named(tmp_path, content):
    (tmp_path / "step.json").write_text(content)
    with pytest.raises(ResultsError, match=r"step\.json holds no results"):
        results.write(measured("kernels"), tmp_path)
    with pytest.raises(ResultsError, match="cannot read"):
        read(tmp_path / "no.json")
