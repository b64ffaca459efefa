"""The page of a training: the best accuracy first, its course, the classes, what could not be read."""

import re
import time

import pytest
from pydantic import ValidationError

from batchnorm.records import Evaluation, RecordFile, Result, Run
from batchnorm.report import build, course, render
from batchnorm.report.contents import gather
from tests.mutations.mutation import Mutation

CLASSES = ["cat", "dog", "<hen>"]


def run(**values):
    usual = {
        "command": "batchnorm train run.toml --out a",
        "started": "2026-01-01T00:00:00+00:00",
        "classes": CLASSES,
    }
    return Run(
        experiment="train", title="resnet18 on pictures", config={}, seeds=[0], versions={}, machine="m",
        **{**usual, **values},
    )  # fmt: skip


def evaluation(step, accuracy, **values):
    return Evaluation(
        job="network", step=step, loss=2.0, accuracy=accuracy, loss_validation=2.5, rate=0.1 / step,
        **{"confusion": [(0, 0, 9), (0, 1, 1), (1, 1, 4), (1, 0, 5), (1, 2, 1), (2, 2, 8)], **values},
    )  # fmt: skip


def result(**values):
    return Result(
        job="network", config={}, steps=40, diverged=False, loss=1.0, accuracy=0.55, accuracy_moving=0.54, seconds=1.0,
        **values,
    )  # fmt: skip


RECORDS = [
    run(),
    evaluation(10, 0.3),
    evaluation(20, 0.6),
    evaluation(30, 0.6),
    evaluation(40, 0.55),
    result(),
]


def words(page):
    page = re.sub(r"<(style|svg).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", page).replace("\u00a0", " ").split())


def test_the_headline_is_the_best_accuracy_which_evaluate_says_too():
    said = words(render(RECORDS))
    assert "60.00 % of the validation images right after 20 steps" in said
    assert (
        "The best of 4 evaluations, which checkpoints/best.pt holds; 55.00 % after 40 steps (54.00 % by"
        in said
    )
    assert "of the validation images right after 1 step " in words(render([run(), evaluation(1, 0.2)]))


def test_the_course_has_accuracy_losses_and_rate_on_an_axis_that_suits_the_steps():
    found = course.course(gather(RECORDS))
    assert found is not None
    assert [panel.y_label for panel in found.panels] == ["validation accuracy", "loss, nats", "learning rate"]
    assert [line.label for line in found.panels[1].lines] == ["training", "validation"]
    assert found.panels[1].lines[0].y == [2.0] * 4
    assert not any(panel.x_log for panel in found.panels)
    uneven = course.course(gather([run(), *(evaluation(step, 0.5) for step in (10, 20, 100, 1000))]))
    assert uneven is not None and all(panel.x_log for panel in uneven.panels)


def test_records_of_an_earlier_version_have_an_accuracy_and_a_loss():
    old = [Evaluation(job="network", step=step, loss=float("nan"), accuracy=0.5) for step in (10, 20)]
    found = course.course(gather([run(classes=[]), *old]))
    assert found is not None
    assert [panel.y_label for panel in found.panels] == ["validation accuracy"]
    assert "Classes" not in words(render([run(classes=[]), *old]))
    assert course.course(gather([run()])) is None


def test_the_classes_are_those_of_the_best_evaluation_the_lowest_first():
    grid = course.classes(gather(RECORDS))
    assert grid is not None
    assert grid.rows == [
        ["dog", "10", "40.00\u00a0%", "cat (5), <hen> (1)"],
        ["cat", "10", "90.00\u00a0%", "dog (1)"],
        ["<hen>", "8", "100.00\u00a0%", ""],
    ]
    page = render(RECORDS)
    assert "&lt;hen&gt;" in page and "<hen>" not in page
    other = [*RECORDS[:2], evaluation(20, 0.6, confusion=[(0, 0, 1)]), *RECORDS[3:]]
    assert [row[0] for row in (course.classes(gather(other)) or grid).rows] == ["cat"]


def test_the_matrix_has_a_row_for_each_class_and_is_left_out_for_many():
    matrix = course.confusion(gather(RECORDS))
    assert matrix is not None
    assert matrix.rows == [[9, 1, 0], [5, 4, 1], [0, 0, 8]]
    assert (matrix.share(1, 0), matrix.share(2, 2)) == (0.5, 1.0)
    many = [
        run(classes=[str(number) for number in range(200)]),
        evaluation(1, 0.5, confusion=[(7, 7, 3), (7, -1, 2)]),
    ]
    assert course.confusion(gather(many)) is None
    grid = course.classes(gather(many))
    assert grid is not None and grid.rows == [["7", "5", "60.00\u00a0%"]]


def test_images_that_could_not_be_read_are_on_the_page():
    ended = result(unreadable=3, unreadable_images=["a/torn.jpg", "b.png"])
    assert "3 images: a/torn.jpg, b.png, …" in words(render([*RECORDS[:-1], ended]))
    assert "Could not be read" not in words(render(RECORDS))


def test_a_run_that_was_made_longer_shows_both_commands():
    longer = run(command="batchnorm train --out a --resume --set training.steps=40")
    said = words(render([*RECORDS[:3], longer, *RECORDS[3:]]))
    assert "batchnorm train run.toml --out a batchnorm train --out a --resume --set training.steps=40" in said


def test_the_course_is_a_figure_too_and_progress_is_told(tmp_path):
    with RecordFile(tmp_path / "records.jsonl") as file:
        for record in RECORDS:
            file.append(record)
    told = []

    def progress(charts):
        for chart in charts:
            told.append(chart.name)
            yield chart

    build(tmp_path, progress)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"course.png", "course.svg"}
    assert told == ["course", "course"]  # on the page, and as a file


@pytest.mark.parametrize("confusion", [[(5, 5, 1)], [(0, 0, 0)], [(1, -1, 4)], [(10**6, 0, 1)], []])
def test_whatever_was_recorded_is_shown(confusion):
    assert "</html>" in render([run(), evaluation(1, 0.5, confusion=confusion)])


@pytest.mark.parametrize(
    "pair", [(-5, 0, 3), (0, -2, 3), (0, 0, -1), (0, 0, -(10**400)), (10**7, 0, 1), (0, 0, 10**400)]
)
def test_what_no_evaluation_counts_is_no_record(pair):
    with pytest.raises(ValidationError):
        evaluation(1, 0.5, confusion=[pair])


def test_many_classes_take_a_moment_and_the_lowest_are_listed():
    pairs = [(number, taken, 1) for number in range(3000) for taken in (number, -1)]
    started = time.monotonic()
    said = words(
        render(
            [run(classes=[f"class {number}" for number in range(3000)]), evaluation(1, 0.5, confusion=pairs)]
        )
    )
    assert time.monotonic() - started < 20
    assert "All 1000 classes" in said and "the lowest 1,000 of 3,000" in said


def test_one_odd_gap_is_no_reason_for_a_logarithmic_axis():
    found = course.course(gather([run(), *(evaluation(step, 0.5) for step in (500, 510, 1000, 1500, 2000))]))
    assert found is not None and not any(panel.x_log for panel in found.panels)


def test_an_evaluation_of_a_network_that_diverged_is_not_the_best():
    lost = Evaluation(job="network", step=30, loss=float("nan"), accuracy=0.9)
    assert "60.00 % of the validation images right after 20 steps" in words(render([*RECORDS[:3], lost]))


def test_a_run_that_was_made_longer_and_stopped_has_not_come_to_its_end():
    longer = run(
        command="batchnorm train --out a --resume --set training.steps=900",
        started="2026-02-02T00:00:00+00:00",
    )
    said = words(render([*RECORDS, longer, evaluation(50, 0.7)]))
    assert "The run has not come to its end." in said and "not yet" in said
    assert "moving averages" not in said
    assert "2026-01-01" in said and "2026-02-02" not in said


MUTATIONS = [
    Mutation(
        "the last of equally good evaluations is the best", "report/course.py",
        "every = [network.evaluations[step] for step in sorted(network.evaluations)]",
        "every = [network.evaluations[step] for step in sorted(network.evaluations, reverse=True)]",
        "best.pt holds the first",
    ),
]  # fmt: skip
