"""What Sync should cost, from bare collectives that were made up; and the page that says it."""

import importlib
import re
from pathlib import Path

import pytest

from batchnorm.bench import link, results, table
from batchnorm.bench.traffic import Collective, Name
from tests.bench.sample import measured, step_of_ranks

ROOT = Path(__file__).parents[2]


def test_a_link_is_a_latency_and_a_bandwidth():
    row = step_of_ranks(4, plain=0.2, ours=0.5, gather=2e-3, reduce=1e-3)
    links = link.links(row)
    between = 2**20 - 8  # bytes of a rank's tensor
    assert links["all_gather"].bandwidth == pytest.approx(3 * between / 2)  # bytes received in a millisecond
    assert links["all_reduce"].bandwidth == pytest.approx(1.5 * between / 1)
    expected: tuple[tuple[Name, float], ...] = (("all_gather", 2.0), ("all_reduce", 1.0))
    for kind, ms in expected:
        small, large = Collective(kind, 8), Collective(kind, 2**20)
        assert links[kind].ms(small.received_bytes(4)) == pytest.approx(ms)
        assert link.predict_ms(row, [small, large, large]) == pytest.approx(5 * ms)


def test_alone_sync_is_predicted_to_cost_nothing():
    assert link.predict_ms(step_of_ranks(1, 0.1, 0.1, 1e-3, 1e-3), [Collective("all_gather", 8)]) == 0


def test_noise_is_no_bandwidth_below_zero():
    row = step_of_ranks(2, 0.1, 0.1, 1e-3, 1e-3)
    same = {who: time.model_copy(update={"ms": 1.0}) for who, time in row.times.items()}
    links = link.links(row.model_copy(update={"times": same}))
    assert links["all_gather"].ms(2**20) == pytest.approx(1.0)


def test_tables_of_several_processes():
    steps, links = table.grids(measured("scaling"))
    assert steps.columns[1:4] == ["DDP", "±", "core ms"]
    # 69 layers of an all_gather of 2 ms and an all_reduce of 1 ms: 207 ms, to which a layer's bytes add next to nothing
    assert steps.rows == [
        ["1", "100", "0%", "100", "100", "0%", "100", "0.0", "0.0"],
        ["4", "200", "0%", "100", "500", "0%", "250", "300", "207"],
    ]
    assert links.rows[0] == ["all_gather, 1 rank", "0.0200", "0%", "0.0400", "0%", ""]
    assert links.rows[3] == ["all_reduce, 4 ranks", "1.00", "0%", "2.00", "0%", "1,573"]


def test_the_page_of_results_explains_its_words(tmp_path):
    text = results.write(measured("scaling"), tmp_path).read_text()
    assert text.index("## Several processes") < text.index("**A step of BNInception/4, 32×1×28×28 a rank")
    assert "core ms is the core time of one rank's step" in text


@pytest.fixture
def scaling(monkeypatch):
    pytest.importorskip("torchvision", reason="ResNet-50 is torchvision's")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("scaling")


@pytest.mark.slow
def test_the_page_is_what_its_script_writes(scaling):
    assert (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8") == scaling.page()


@pytest.mark.slow
def test_what_was_measured_comes_to_the_page(scaling, tmp_path, monkeypatch):
    results.write(measured("scaling"), tmp_path)
    monkeypatch.setattr(scaling, "MEASURED", tmp_path / "scaling.json")
    for grid in table.grids(measured("scaling")):
        assert table.markdown(grid) in scaling.page()


@pytest.mark.parametrize(
    ("name", "layers", "channels", "parameters", "buckets"),
    [("BN-Inception", 69, 9952, 11_188_288, 3), ("ResNet-50", 53, 26_560, 25_557_032, 5)],
)
def test_the_page_s_tables_are_the_formulas_by_hand(name, layers, channels, parameters, buckets):
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = re.search(
        rf"\*\*{name}: {layers} BN layers, {channels:,} channels\*\*\n\n(.*?)\n\n", text, re.DOTALL
    )
    assert found
    _, _, *lines = found[1].splitlines()
    rows = [[float(cell.replace(",", "")) for cell in line.strip("| ").split(" | ")] for line in lines]
    assert [row[0] for row in rows] == [1, 8, 64, 1024]
    assert rows[0] == [1, 0, 0, 0, 0, 0, 0]
    for p, exchanges, sync, reduced, gradients, broadcasts, buffers in rows[1:]:
        assert (exchanges, reduced, broadcasts) == (2 * layers, buckets, 2)
        gathered, summed = (p - 1) * (layers + 2 * channels) * 8, 2 * (p - 1) / p * 2 * channels * 8
        assert sync == pytest.approx((gathered + summed) / 1e6, rel=5e-3)
        assert gradients == pytest.approx(2 * (p - 1) / p * 4 * parameters / 1e6, rel=5e-3)
        assert buffers == pytest.approx((2 * channels * 4 + layers * 8) / 1e6, rel=5e-3)
