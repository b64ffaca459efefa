"""docs/interoperability.md names a test for each row."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "interoperability.md").read_text()
ROWS = [
    line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| tool", "| ---"))
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_each_row_has_its_test(row):
    named = re.findall(r"`([\w./]+\.py)::(\w+)`", row)
    assert named
    for path, test in named:
        assert f"def {test}(" in (HERE / path).read_text()


def test_each_file_of_tests_is_on_the_page():
    files = {path.name for path in HERE.glob("test_*.py")} - {"test_page.py"}
    assert files == {name for name in files if f"{name}::" in PAGE}
