"""What is said of the five networks of figure 3, and how it is shown."""

import io
import re

import pytest
from rich.console import Console

from batchnorm.experiments.imagenet.figure_3 import Figure3
from batchnorm.experiments.imagenet.inception_settings import ImagenetSettings, preset
from batchnorm.experiments.progress import summary
from batchnorm.report.contents import Network
from tests.experiments.made_up import (
    FIVE,
    SETTINGS,
    curve,
    judged,
    main_rows,
    train_all,
)


def test_steps_are_those_to_the_best_accuracy_of_inception_from_the_same_seed():
    verdict = judged(
        {
            "inception-seed0": {8_000: 0.8, 10_000: 0.9, 16_000: 0.89},
            "inception-seed1": {8_000: 0.88, 10_000: 0.87, 16_000: 0.88},
            "bn-x5-seed0": {400: 0.88, 500: 0.9, 3_200: 0.92},
            "bn-x5-seed1": {900: 0.87, 1_000: 0.88, 3_200: 0.89},
        }
    )
    rows = main_rows(verdict)
    # 10,000 and 8,000 steps; 10,000 / 500 = 20 and 8,000 / 1,000 = 8, not 9,000 / 750
    assert rows["Inception"][:3] == ["9,000 ± 1,414", "1.0 ± 0.0", "89.00 % ± 1.41 %"]
    assert rows["BN-x5"][:3] == ["750 ± 354", "14.0 ± 8.5", "90.50 % ± 2.12 %"]
    assert rows["BN-x30"][:3] == ["not reached", "not reached", "10.00 % ± 0.00 %"]
    assert verdict.outcome == "seen"
    assert "89.00 % ± 1.41 % after 9,000 ± 1,414 steps" in verdict.measured
    assert "BN-x5 needs 14 times fewer steps (750 ± 354)" in verdict.measured
    assert "BN-x5 ends highest, +1.5" in verdict.measured
    each = verdict.tables["Every network"]
    assert each.rows[0] == [
        "Inception", "0", "0.02", "16,000", "10,000", "10,000", "90.00 %", "89.00 %", "–",
    ]  # fmt: skip
    assert [row[4] for row in each.rows if row[0] == "BN-x5"] == ["500", "1,000"]
    assert [row[4] for row in each.rows if row[0] == "BN-x30"] == ["not reached"] * 2


def test_how_far_ahead_each_network_is_on_the_way():
    verdict = judged(
        {
            "inception-seed0": {1_000: 0.8, 2_000: 0.85, 4_000: 0.88, 8_000: 0.89, 16_000: 0.9},
            "inception-seed1": {3_000: 0.79, 4_000: 0.81, 16_000: 0.9},
            "bn-x5-seed0": {100: 0.8, 500: 0.85, 1_000: 0.879},
            "bn-x5-seed1": {500: 0.8, 1_600: 0.899},
        }
    )
    table = verdict.tables["Times fewer steps to lesser accuracies"]
    assert table.columns == [
        "accuracy",
        "Inception's steps",
        "BN-Baseline",
        "BN-x5",
        "BN-x30",
        "BN-x5-Sigmoid",
    ]
    rows = [[row[0], row[1], row[3]] for row in table.rows]
    assert rows == [
        ["80.00 % ± 0.00 %", "2,500 ± 2,121", "9.0 ± 1.4"],  # 1,000 / 100 and 4,000 / 500
        ["85.00 % ± 0.00 %", "9,000 ± 9,899", "7.0 ± 4.2"],  # 2,000 / 500 and 16,000 / 1,600
        ["88.00 % ± 0.00 %", "10,000 ± 8,485", "reached by 1 of 2"],
        ["89.00 % ± 0.00 %", "12,000 ± 5,657", "reached by 1 of 2"],
    ]


@pytest.mark.parametrize(
    ("steps", "best", "outcome"),
    [
        (1_600, 0.91, "seen"),  # ten times exactly, one point exactly
        (1_601, 0.91, "not seen here"),
        (1_600, 0.9099, "not seen here"),
        (1_000, 0.95, "seen"),
    ],
)
def test_the_verdict_at_its_borders(steps, best, outcome):
    verdict = judged({"inception": {16_000: 0.9}, "bn-x5": {steps: 0.9}, "bn-x30": {3_200: best}})
    assert verdict.outcome == outcome
    assert "BN-x30 ends highest" in verdict.measured


def test_one_point_is_one_point_whatever_floating_point_makes_of_it():
    for plain in range(5_000, 9_900, 50):  # images of 10,000
        faster = {100: plain / 10_000, 200: (plain + 100) / 10_000}
        verdict = judged({"inception": {16_000: plain / 10_000}, "bn-x5": faster})
        assert verdict.outcome == "seen", plain
        assert "+1 points" in verdict.measured


def test_what_the_sentence_says_and_the_verdict_are_one():
    """9.96 times is not said to be "10.0 times fewer" beside "not seen", nor 0.996 points "+1.0"."""
    verdict = judged({"inception": {16_000: 0.9}, "bn-x5": {1_607: 0.9, 3_200: 0.90996}})
    assert verdict.outcome == "not seen here"
    assert "BN-x5 needs 9.96 times fewer steps" in verdict.measured
    assert "+0.996 points" in verdict.measured


def test_one_network_that_does_not_arrive_is_not_averaged_away():
    verdict = judged(
        {
            "inception": {16_000: 0.9},
            "bn-x5-seed0": {100: 0.95},
            "bn-x5-seed1": {100: 0.85},
            "bn-x30": {3_200: 0.95},
        }
    )
    assert main_rows(verdict)["BN-x5"][:2] == ["reached by 1 of 2", "reached by 1 of 2"]
    assert "BN-x30 needs 5.0 ± 0.0 times fewer" in verdict.measured
    assert "BN-x5 does not reach it from every seed (reached by 1 of 2)" in verdict.measured
    assert verdict.outcome == "not seen here"


def test_a_network_that_diverged_is_said_to_have():
    claim = Figure3(60_000)
    curves = train_all(
        claim, SETTINGS, lambda name: {100: 0.5} if name.startswith("inception") else {100: 0.4}
    )
    for name in ("bn-x30-seed0", "inception-seed1"):
        curves[name] = curve(name, curves[name].config, {100: 0.3, 150: 0.1}, diverged=True)
    verdict = claim.verdict(SETTINGS, curves)
    last = {(row[0], row[1]): row[7] for row in verdict.tables["Every network"].rows}
    assert {key for key, said in last.items() if said == "diverged"} == {("BN-x30", "0"), ("Inception", "1")}
    # its best counts as it was: Inception's is 0.5 from one seed and 0.3 from the other
    assert main_rows(verdict)["Inception"][2] == "40.00 % ± 14.14 %"
    assert main_rows(verdict)["BN-Baseline"][0] == "reached by 1 of 2"
    assert verdict.outcome == "not seen here"


def test_the_papers_own_row_stands_beside_ours_as_printed():
    rows = main_rows(judged({}))
    assert {name: row[3:] for name, row in rows.items()} == {
        "Inception": ["31.0e6", "1.0", "72.2 %"],
        "BN-Baseline": ["13.3e6", "2.3", "72.7 %"],
        "BN-x5": ["2.1e6", "14.8", "73.0 %"],
        "BN-x30": ["2.7e6", "11.5", "74.8 %"],
        "BN-x5-Sigmoid": ["–", "–", "69.8 %"],
    }


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({}, "A scaled run, on fashion-mnist and not on ImageNet."),
        ({"data": "cifar-10"}, "A scaled run, on cifar-10 and not on ImageNet."),
        (preset(True, None), "A quick look, scaled down, on fashion-mnist and not on ImageNet."),
        (preset(False, "/imagenet") | {"data": "/imagenet"}, "At the paper's scale, on /imagenet."),
        (
            preset(False, "/imagenet") | {"data": "/imagenet", "steps": 1_000},
            "A scaled run, on /imagenet with other settings than the paper's.",
        ),
        (
            preset(True, "/imagenet") | {"data": "/imagenet"},
            "A quick look, scaled down, on /imagenet with other settings than the paper's.",
        ),
    ],
)
def test_a_scaled_run_says_that_it_is_one(chosen, said):
    settings = ImagenetSettings(**({"rates": (0.02,)} | chosen))
    verdict = judged({}, settings)
    assert said in verdict.measured
    (main, *_) = verdict.tables.values()
    assert said in main.note
    assert f"{settings.seeds} seed" in main.note


def test_one_seed_is_not_called_a_mean_of_one():
    (main, *_) = judged({}, SETTINGS.model_copy(update={"seeds": 1})).tables.values()
    assert "±" not in main.note
    assert "1 seeds" not in main.note


def test_the_chart_holds_every_line_and_where_it_is_drawn():
    claim = Figure3(60_000)
    ends = dict(zip(FIVE, (0.88, 0.89, 0.9, 0.905, 0.35), strict=True))
    curves = train_all(
        claim,
        SETTINGS,
        lambda name: {
            100: 0.3 - 0.02 * name.endswith("1"),
            3_200: ends[name.rsplit("-seed", 1)[0]] - 0.02 * name.endswith("1"),
        },
    )
    (chart,) = claim.charts(SETTINGS, curves)
    assert chart.name == "figure-2"
    (panel,) = chart.panels
    assert [line.label for line in panel.lines] == [
        "Inception", "BN-Baseline", "BN-x5", "BN-x30", "BN-x5-Sigmoid",
    ]  # fmt: skip
    for line, end in zip(panel.lines, ends.values(), strict=True):
        assert line.x == [100, 3_200]
        assert line.y == pytest.approx([0.29, end - 0.01])  # the median of two seeds
        assert line.low == pytest.approx([0.28, end - 0.02])
        assert line.high == pytest.approx([0.3, end])
    assert panel.y_range is not None
    low, high = panel.y_range
    assert 0 <= low < 0.35 < 0.905 < high <= 1  # the worst network's best is in the picture too


@pytest.mark.parametrize("accuracies", [{100: 0.1}, {100: 0.0}, {100: 1.0}, {100: 0.97, 200: 0.99}])
def test_a_chart_has_a_range_whatever_the_accuracies(accuracies):
    claim = Figure3(60_000)
    (chart,) = claim.charts(SETTINGS, train_all(claim, SETTINGS, lambda name: accuracies))
    (panel,) = chart.panels
    assert panel.y_range is not None
    low, high = panel.y_range
    best = max(accuracies.values())
    assert 0 <= low <= best <= high <= 1
    assert low < high


def test_in_a_terminal_no_line_is_too_long_and_no_number_loses_its_sign():
    accuracies = {
        "inception-seed0": {12_000: 0.9},
        "inception-seed1": {16_000: 0.88},
        "inception-seed2": {14_000: 0.89},
        "bn-x5": {1_200: 0.9},
    }
    settings = SETTINGS.model_copy(update={"seeds": 3})
    verdicts = [
        judged(accuracies, settings).model_copy(update={"claim": "another"}),
        judged(accuracies, settings),
    ]
    for width in (20, 60, *range(80, 121)):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(summary(verdicts))
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        if width < 80:
            continue
        assert not any("…" in line for line in lines)
        assert not any(line.strip(" │").startswith("%") for line in lines)
        (grid,) = [part for part in "\n".join(lines).split("\n\n") if "31.0e6" in part]
        assert not re.search(r"±(?! \d)", grid)
        # side by side where there is room, else the spread below
        assert ("14,000 ± 2,000" in grid) == (width >= 84)
        for cell in ("BN-x5-Sigmoid", "14,000", "89.00 %", "± 1.00 %", "14.8", "69.8 %", "not reached"):
            assert cell in grid
        words = " ".join(" ".join(lines).split())
        assert "Every network" not in words  # that is in the report
        assert "(1,200 ± 0)" in words.replace("│ │ ", "")


def test_no_two_lines_of_the_picture_look_alike():
    claim = Figure3(60_000)
    (chart,) = claim.charts(SETTINGS, train_all(claim, SETTINGS, lambda name: {100: 0.5, 200: 0.6}))
    looks = {(line.role, line.dashed, line.markers) for line in chart.panels[0].lines}
    assert len(looks) == len(FIVE)
    assert "fashion-mnist" in chart.title
    assert "not on ImageNet" in chart.caption


def test_a_network_of_the_recipe_is_known_to_have_batch_normalization():
    jobs = Figure3(60_000).jobs(SETTINGS, {})
    for name, with_bn in (("inception-seed0", False), ("bn-x5-seed0", True)):
        made = curve(name, jobs[name], {100: 0.5}, moving=0.4 if with_bn else None)
        assert made.result is not None
        assert Network(name, {100: made.evaluations[0]}, made.result).normalized == with_bn
