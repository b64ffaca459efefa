"""Each hostile file is an error of one line, soon and in the memory that a good file would take."""

import os
import re
from pathlib import Path

import pytest

from tests.hostile_files import CASES, INDICES, outcome

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each is read in a forked process")
PAGE = Path(__file__).parents[1] / "docs" / "training.md"


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_an_error_of_one_line(name, tmp_path):
    found = outcome(name, tmp_path / "file")
    assert re.fullmatch(r"(Data|Checkpoint|Config)Error: [^\n]*(file|training.steps)[^\n]*", found.error), (
        found.error
    )
    assert len(found.error) < 1000
    assert found.megabytes < 64
    assert found.seconds < 5


@pytest.mark.parametrize("name", INDICES)
def test_an_index_is_made_anew(name, tmp_path):
    found = outcome(name, tmp_path / "file")
    assert found.error.startswith("returned") and "offsets=[512] sizes=[1] labels=[0]" in found.error
    assert found.megabytes < 64
    assert found.seconds < 5


def test_the_page_lists_them():
    assert all(f"| {name} |" in PAGE.read_text() for name in CASES | INDICES)
