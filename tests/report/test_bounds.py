"""Records from elsewhere: what no page can show is refused by its line, the rest is drawn in bounded time and size."""

import json
import math
import random
import time

import pytest

from batchnorm import report
from batchnorm.records import Chart, Evaluation, Line, Panel, RecordError
from batchnorm.report.curve import thinned

from . import sample

POINT = Line(label="a", role="bn", x=[1.0], y=[0.5])


def panel(*lines, **more):
    return Panel(title="t", x_label="x", y_label="y", lines=list(lines), **more)


def chart(*panels, name="n"):
    return Chart(claim="c", name=name, title="t", caption="", panels=list(panels))


def built(folder, *records):
    sample.write(folder / "run", [sample.RUN, *records])
    return report.build(folder / "run")


def changed(kind, **values):
    """A record's line of the file, with values that the library itself would refuse to write."""
    records = {
        "evaluation": Evaluation(job="j", step=1, loss=1.0, accuracy=0.5),
        "chart": chart(panel(POINT)),
    }
    return json.dumps({**json.loads(records[kind].model_dump_json()), **values})


FAR = "9" * 401


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (changed("evaluation", job="j" * 2**20), "job: String should have at most 300 characters"),
        (changed("evaluation", step=-1), "step: .*greater than or equal to 0"),
        (changed("evaluation", step=0).replace('"step": 0', f'"step": {FAR}'), "step: "),
        (changed("chart", panels=[json.loads(panel(POINT).model_dump_json())] * 300), "panels: .*at most 12"),
        (changed("chart", name="n" * 5_000), "name: .*at most 100"),
        (
            changed("chart", panels=[json.loads(panel(*[POINT] * 60).model_dump_json()) | {
                "lines": [json.loads(POINT.model_dump_json())] * 3_000
            }]),
            "lines: .*at most 60",
        ),
        (changed("chart", title="t" * 2**20), "title: .*at most 10000"),
    ],
)  # fmt: skip
def test_what_no_page_shows_is_refused_by_its_line(tmp_path, line, says):
    sample.write(tmp_path / "run", [sample.RUN])
    with (tmp_path / "run" / "records.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RecordError, match=f"records.jsonl, line 2: .*{says}") as caught:
        report.build(tmp_path / "run")
    assert len(str(caught.value)) < 500


def test_more_charts_than_a_page_shows(tmp_path):
    with pytest.raises(RecordError, match="there are 61 charts, and a page shows 60"):
        built(tmp_path, *(chart(panel(POINT), name=f"n{number}") for number in range(61)))


def test_a_file_that_no_run_writes(tmp_path):
    sample.write(tmp_path / "run", [sample.RUN])
    with (tmp_path / "run" / "records.jsonl").open("ab") as file:
        file.truncate(2**40)
    with pytest.raises(RecordError, match="has more than 256 MB"):
        report.build(tmp_path / "run")


@pytest.mark.slow
def test_a_million_points_are_drawn_soon_and_small(tmp_path):
    y = [math.sin(step / 1e4) + random.Random(step).random() for step in range(400_000)]
    lines = [Line(label=label, role="bn", x=list(range(400_000)), y=y, low=y, high=y) for label in "ab"]
    started = time.monotonic()
    page = built(tmp_path, chart(panel(*lines)))
    assert time.monotonic() - started < 60
    assert page.stat().st_size < 2_000_000
    assert sum(path.stat().st_size for path in (tmp_path / "run" / "figures").iterdir()) < 2_000_000


def test_a_thinned_line_keeps_its_ends_and_extremes():
    y = [None if 500 < step < 900 else random.Random(step).gauss(0, 1) for step in range(50_000)]
    y[31_234] = 99.0
    line = Line(label="a", role="bn", x=list(range(50_000)), y=y, low=y, high=y)
    found = thinned(line)
    assert len(found.x) <= 2_100 and found.low == found.high == found.y
    assert (found.x[0], found.x[-1]) == (0, 49_999) and 99.0 in found.y
    known = [value for value in y if value is not None]
    assert min(value for value in found.y if value is not None) == min(known)
    assert thinned(POINT) is POINT


@pytest.mark.parametrize("limits", [(-1e308, 1e308), (0.0, 1e308), (-1e300, 0.0)])
def test_an_absurd_range_is_left_to_the_values(tmp_path, limits):
    assert built(tmp_path, chart(panel(POINT, y_range=limits))).exists()


@pytest.mark.parametrize("started", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "yesterday"])
def test_a_time_that_is_none_is_shown_as_it_stands(tmp_path, started):
    sample.write(tmp_path / "run", [sample.RUN.model_copy(update={"started": started})])
    assert started in report.build(tmp_path / "run").read_text().replace("&#43;", "+")
