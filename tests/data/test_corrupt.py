"""The tally of unreadable images, and where it ends a run."""

import json

import pytest

from batchnorm.data.corrupt import Corrupt
from batchnorm.data.idx import DataError


def test_distinct_names_count_once_in_the_order_they_were_met():
    corrupt = Corrupt(0.5, 10)
    corrupt.add({"b": "torn"})
    corrupt.add({"a": "empty", "b": "torn"})
    assert corrupt.names == ["b", "a"]
    assert str(corrupt) == "2 of 10 images cannot be read: b: torn, a: empty"
    assert str(Corrupt(0.5, 10)) == "0 of 10 images cannot be read"


@pytest.mark.parametrize(
    ("share", "images", "limit"), [(0.01, 1000, 10), (0.01, 99, 0), (0.29, 100, 29), (1.0, 7, 7)]
)
def test_the_share_may_be_reached_but_not_passed(share, images, limit):
    corrupt = Corrupt(share, images)
    assert corrupt.limit == limit
    corrupt.add({str(number): "torn" for number in range(limit)})
    with pytest.raises(DataError, match=f"{limit + 1} of {images:,} images cannot be read.*corrupt_share"):
        corrupt.add({"one more": "torn"})


def test_the_error_names_the_first_few():
    with pytest.raises(
        DataError, match=r"0: torn, 1: torn, 2: torn, and 2 more; more than 1 stop a run: repair"
    ):
        Corrupt(0.01, 100).add({str(number): "torn" for number in range(5)})


def test_a_tally_is_saved_in_plain_values_and_continued():
    saved = Corrupt(0.1, 30)
    saved.add({"a": "torn", "b": "torn"})
    state = saved.state_dict()
    corrupt = Corrupt(0.1, 30)
    corrupt.load_state_dict(state)
    corrupt.add({"a": "torn", "c": "torn"})
    saved.add({"c": "torn"})
    assert json.loads(json.dumps(state)) == {
        "found": {"a": "torn", "b": "torn"}
    }  # a copy, and so was what it filled
    with pytest.raises(DataError, match="4 of 30"):
        corrupt.add({"d": "torn"})
