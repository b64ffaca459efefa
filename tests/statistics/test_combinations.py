"""The table of docs/statistics.md: each cell is what it says. What a column asks is in columns.py."""

import contextlib
import faulthandler
import itertools
import re
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import batchnorm as bn
from tests.forked import CONTEXT
from tests.statistics.columns import COLUMNS
from tests.statistics.formulas import Kind

PAGE = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text()
ROWS: dict[str, Kind] = {
    "Batch (None)": None,
    "Ghost": bn.Ghost(4),
    "Sync": bn.Sync(),
    "Renorm": bn.Renorm(1.5, 0.25),
    "Population": bn.Population(),
}


def table() -> tuple[list[str], dict[str, list[str]]]:
    """The names of the columns, and the cells of each row."""
    text = PAGE.split("<!-- combinations -->")[1].split("<!-- /combinations -->")[0]
    header, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()
    )
    return header[1:], {row: cells for row, *cells in rows}


NAMES, CELLS = table()


@dataclass(frozen=True)
class Failure:
    """What an error says, of whatever process."""

    kind: str
    message: str
    traceback: str

    def refuses(self, row: str, column: str) -> bool:
        """It is an error that names both."""
        names = (name.lower() in self.message.lower() for name in column.split("/"))
        return self.kind in ("RuntimeError", "ValueError", "TypeError") and row in self.message and any(names)


def failure(row: str, column: str, part: int, *, last: Callable[[], object] = lambda: None) -> Failure | None:
    try:
        COLUMNS[column][part](ROWS[row])
        last()
    except Exception as error:
        return Failure(type(error).__name__, str(error), traceback.format_exc())
    return None


def join(rank: int, store: str) -> None:
    """Become a rank of the group that meets in the file `store`."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", world_size=2, rank=rank, timeout=timedelta(seconds=30)
    )


def failure_on_rank(rank: int, row: str, column: str, part: int) -> Failure | None:
    faulthandler.dump_traceback_later(100, exit=True)
    try:
        return failure(row, column, part, last=dist.barrier)
    finally:
        faulthandler.cancel_dump_traceback_later()


class Ranks:
    """Two processes in a group, and two others after what has failed in it: nobody waits for what does not come."""

    def __init__(self, folder: Path) -> None:
        self._stores = (str(folder / str(n)) for n in itertools.count())
        self._pools: list[ProcessPoolExecutor] = []

    def _do(self, work: Callable[..., Any], *arguments: object) -> list[Any]:
        """On both ranks, and both have ended when this raises."""
        found = [pool.submit(work, rank, *arguments) for rank, pool in enumerate(self._pools)]
        wait(found, timeout=120)
        return [each.result(timeout=0) for each in found]

    def _begin(self) -> None:
        # gloo's sockets are not what is tested, and on a busy machine one may be lost; a process in which that has
        # happened numbers its groups otherwise than the other, and cannot join it again
        for last in (False, False, True):
            self._pools = [ProcessPoolExecutor(1, CONTEXT) for _ in range(2)]
            try:
                self._do(join, next(self._stores))
                return
            except RuntimeError:
                self.close()
                if last:
                    raise

    def failures(self, row: str, column: str, part: int) -> list[Failure | None]:
        if not self._pools:
            self._begin()
        found = self._do(failure_on_rank, row, column, part)
        if any(found):
            self.close()
        return found

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()
        self._pools = []


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """What each of two processes found wrong in its part of a cell."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with contextlib.closing(Ranks(tmp_path_factory.mktemp("stores"))) as ranks:
        yield ranks.failures


def test_every_row_and_column_is_tested():
    assert list(CELLS) == list(ROWS)
    assert list(COLUMNS) == NAMES
    assert {row: len(cells) for row, cells in CELLS.items()} == dict.fromkeys(ROWS, len(NAMES))


def test_the_page_says_what_each_column_asks():
    below = PAGE.split("<!-- /combinations -->")[1]
    assert re.findall(r"\*\*(.+?)\*\*", below) == NAMES


def on_two_ranks(row, column):
    return row == "Sync" or column == "DDP"


def marks(row, column):
    ranks = [pytest.mark.xdist_group("combinations on ranks")] * on_two_ranks(row, column)
    return [*ranks, *[pytest.mark.slow] * (column == "compile")]


@pytest.mark.parametrize(
    ("row", "column", "claim"),
    [
        pytest.param(row, column, claim, id=f"{row}: {column}", marks=marks(row, column))
        for row, cells in CELLS.items()
        for column, claim in zip(NAMES, cells, strict=False)  # that there are as many is tested above
    ],
)
def test_a_cell_is_what_it_says(row, column, claim, request):
    attempt = (
        request.getfixturevalue("on_ranks") if on_two_ranks(row, column) else lambda *cell: [failure(*cell)]
    )
    assert claim == "yes" or claim.startswith("no: "), claim
    for part in range(len(COLUMNS[column])):
        for found in attempt(row, column, part):
            if claim == "yes":
                assert found is None, found.traceback
            else:
                assert found is not None, f"it works, and the page says {claim}"
                assert found.refuses(row, column), found.traceback
