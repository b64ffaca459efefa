"""Records survive a round trip, a crash and a replay; a wrong line is named."""

import math

import pytest

from batchnorm.records import (
    Chart,
    Evaluation,
    Line,
    Panel,
    Record,
    RecordError,
    RecordFile,
    Result,
    Run,
    read,
)

RUN = Run(
    experiment="mnist",
    title="t",
    command="batchnorm",
    config={"steps": 5},
    seeds=[0],
    versions={"torch": "2"},
    machine="m",
    started="2026-01-01T00:00:00+00:00",
)


def evaluation(step: int, **values: float) -> Evaluation:
    return Evaluation(job="bn", step=step, **({"loss": 1.5, "accuracy": 0.25} | values))


def test_records_come_back_as_they_were(tmp_path):
    line = Line(label="l", role="bn", x=[1, 2], y=[0.1, None], low=[0.0, None], high=[0.2, None])
    panel = Panel(title="", x_label="x", y_label="y", lines=[line])
    records: list[Record] = [
        RUN,
        evaluation(1),
        Chart(claim="c", name="n", title="t", caption="", panels=[panel]),
    ]
    with RecordFile(tmp_path / "run" / "records.jsonl") as file:
        assert all(file.append(record) for record in records)
    assert list(read(file.path)) == records


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_diverged_loss_is_valid_json_and_comes_back(tmp_path, value):
    with RecordFile(tmp_path / "records.jsonl") as file:
        file.append(evaluation(1, loss=value))
    text = file.path.read_text()
    assert '"loss":"' in text  # a string: bare NaN is not JSON
    (back,) = read(file.path)
    assert isinstance(back, Evaluation)
    assert repr(back.loss) == repr(value)


def test_every_float_comes_back_bit_for_bit(tmp_path):
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308]
    with RecordFile(tmp_path / "records.jsonl") as file:
        for step, value in enumerate(values):
            file.append(evaluation(step, loss=value))
    assert [r.loss for r in read(file.path) if isinstance(r, Evaluation)] == values


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_line_cut_off_by_a_crash_is_passed_over_and_then_written_again(tmp_path, cut):
    path = tmp_path / "records.jsonl"
    with RecordFile(path) as file:
        for step in (1, 2, 3):
            file.append(evaluation(step))
    path.write_bytes(path.read_bytes()[:-cut])
    assert [r.step for r in read(path) if isinstance(r, Evaluation)] == [1, 2]
    with RecordFile(path) as again:
        assert [again.append(evaluation(step)) for step in (1, 2, 3)] == [False, False, True]
    assert list(read(path)) == [evaluation(step) for step in (1, 2, 3)]


def test_a_replayed_network_is_not_written_twice(tmp_path):
    result = Result(
        job="bn", config={}, steps=3, diverged=False, loss=1, accuracy=1, train_accuracy=1, seconds=1
    )
    with RecordFile(tmp_path / "records.jsonl") as file:
        assert file.append(result)
        assert not file.append(result.model_copy(update={"seconds": 2.0}))
        assert file.append(result.model_copy(update={"job": "plain"}))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not json", "line 2"),
        ('{"kind": "surprise"}', "surprise"),
        ('{"kind": "evaluation", "job": "a", "step": "x", "loss": 1, "accuracy": 1}', "evaluation.step"),
        ('{"kind": "evaluation", "job": "a", "step": 1, "loss": 1, "accuracy": 1, "extra": 1}', "extra"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, says):
    path = tmp_path / "records.jsonl"
    path.write_text(RUN.model_dump_json() + "\n" + line + "\n")
    with pytest.raises(RecordError, match="line 2") as caught:
        list(read(path))
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_of_a_newer_version_says_so(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(RUN.model_copy(update={"schema_version": 2}).model_dump_json() + "\n")
    with pytest.raises(RecordError, match="newer version"):
        list(read(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"cannot read .*nowhere"):
        list(read(tmp_path / "nowhere.jsonl"))
