import math
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from batchnorm.records import Chart, Line, Panel
from batchnorm.report import figures, palette
from batchnorm.report.labels import spread_out
from batchnorm.report.scale import format_number, percent, share_y_range

from . import sample

CHARTS = [sample.figure_1a(), sample.figure_1bc(), sample.sweep()]
HOSTILE = '<b onclick="x()">&amp; $\\frac$ _under id="a" url(#b) href="#c" #fe0100 ]]> \x00\x1b\n 漢字 🎉'


def chart(*lines, x_log=False, **panel):
    axes = Panel(title="title", x_label="x", y_label="y", x_log=x_log, lines=list(lines), **panel)
    return Chart(claim="c", name="n", title="t", caption="", panels=[axes])


def inline(chart, prefix="p"):
    return figures.inline_svg(chart.panels[0], prefix, figures.NARROW, "label")


def paths_of_lines(svg):
    return re.findall(r'<path d="([^"]*)"[^>]*fill: none; stroke[^>]*stroke-width: 1.8', svg)


@pytest.mark.slow
@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_the_same_record_gives_the_same_bytes(chart):
    assert figures.png(chart) == figures.png(chart)
    assert figures.svg(chart) == figures.svg(chart)
    assert inline(chart) == inline(chart)


def test_files_are_what_their_names_say():
    assert figures.png(CHARTS[0]).startswith(b"\x89PNG")
    root = ElementTree.fromstring(figures.svg(CHARTS[0]))
    assert root.tag.endswith("svg")
    # text stays text, so that it can be searched and read aloud
    assert "with BN" in {element.text for element in root.iter() if element.tag.endswith("text")}


def test_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    figures.png(CHARTS[0])
    assert dict(matplotlib.rcParams) == before


def test_does_not_follow_the_users_matplotlibrc():
    plain = figures.svg(CHARTS[0])
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "black", "font.size": 30}):
        assert figures.svg(CHARTS[0]) == plain


def test_an_inline_panel_takes_every_colour_from_the_page():
    svg = "".join(inline(chart) for chart in CHARTS)
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) <= {
        "none",
        *(f"var(--{name.replace('_', '-')})" for name in vars(palette.LIGHT)),
    }
    assert "#" not in re.sub(r'url\(#[^)]*\)|href="#[^"]*"', "", svg)
    assert "font-family" not in svg


def test_inline_panels_share_a_page_without_sharing_ids():
    first, second = inline(CHARTS[0], "a"), inline(CHARTS[0], "b")
    ids = re.findall(r' id="([^"]+)"', first)
    assert len(ids) == len(set(ids))
    assert not set(ids) & set(re.findall(r' id="([^"]+)"', second))
    used = set(re.findall(r"url\(#([^)]+)\)", first)) | set(re.findall(r'href="#([^"]+)"', first))
    assert used == set(ids)


def test_hostile_words_stay_words():
    line = Line(label=HOSTILE, role="bn", x=[1, 2], y=[1, 2])
    hostile = chart(line, line).model_copy(update={"title": HOSTILE})
    figures.png(hostile)
    said = HOSTILE.split("\x00")[0].strip()
    document = ElementTree.fromstring(figures.svg(hostile))
    assert any((element.text or "").startswith(said) for element in document.iter())
    element = ElementTree.fromstring(inline(hostile))
    assert any((child.text or "").startswith(said) for child in element.iter())
    assert not any(child.tag == "b" for child in element.iter())


def test_missing_values_are_gaps_and_a_point_between_gaps_is_seen():
    y = [1.0, 2.0, None, 4.0, math.inf, math.nan, 1e300, 8.0, 9.0]
    svg = inline(chart(Line(label="a", role="bn", x=list(range(9)), y=y)))
    (path,) = paths_of_lines(svg)
    assert path.count("M") == 3  # 1-2, 4, 8-9
    assert (
        svg.count("<use") - inline(chart(Line(label="a", role="bn", x=[0, 8], y=[1, 9]))).count("<use") == 1
    )


@pytest.mark.slow
def test_a_log_axis_passes_over_what_it_cannot_show():
    svg = inline(chart(Line(label="a", role="bn", x=[0, 1, 10, 100], y=[5, 1, 2, 3]), x_log=True))
    (path,) = paths_of_lines(svg)
    assert path.count("L") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines",
    [
        [],
        [Line(label="a", role="bn", x=[], y=[])],
        [Line(label="a", role="bn", x=[0.0], y=[None])],
        [Line(label="a", role="bn", x=[7.0], y=[7.0], low=[7.0], high=[7.0])],
        [Line(label="a" * 300, role="other", x=[1.0, 1.0], y=[0.5, 0.5])],
        [Line(label=f"line {i}", role="plain", x=[1.0, 2.0], y=[0.0, i]) for i in range(20)],
    ],
    ids=["no lines", "no points", "no values", "one point", "a long name", "many lines"],
)
@pytest.mark.parametrize("x_log", [False, True])
@pytest.mark.parametrize("y_range", [None, (1.0, 1.0), (0.0, math.inf)])
def test_draws_whatever_was_measured(lines, x_log, y_range):
    assert "</svg>" in inline(chart(*lines, x_log=x_log, y_range=y_range))


def test_a_chart_without_panels_is_drawn():
    assert figures.svg(CHARTS[0].model_copy(update={"panels": []}))


def test_lines_of_one_role_are_told_apart():
    lines = [Line(label=str(i), role="bn", x=[1, 2], y=[i, i], dashed=i > 2) for i in range(6)]
    svg = inline(chart(*lines))
    styles = re.findall(r'style="(fill: none; [^"]*stroke-width: 1.8[^"]*)"', svg)
    assert len(styles) == len(set(styles)) == 6


def test_panels_of_one_quantity_stand_on_one_scale():
    low, high = (
        Line(label="a", role="bn", x=[1, 2], y=[-a, None], high=[a, math.inf], low=[0, 0]) for a in (1, 10)
    )
    axes = [
        Panel(title="", x_label="x", y_label=label, lines=[line])
        for label, line in zip("aab", (low, high, low), strict=True)
    ]
    first, second, third = share_y_range(axes)
    assert first.y_range == second.y_range == (-10 - 0.06 * 20, 10 + 0.06 * 20)
    assert third.y_range is None
    fixed = axes[0].model_copy(update={"y_range": (0.0, 1.0)})
    assert share_y_range([fixed, axes[1]])[0].y_range == (0.0, 1.0)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"), (0.1, "0.1"), (0.001, "0.001"), (1e-5, "10⁻⁵"), (2e-5, "2·10⁻⁵"), (1, "1"), (100, "100"),
        (1000, "1k"), (2500, "2.5k"), (10_000, "10k"), (2.5e6, "2.5M"), (1e9, "1G"), (1e15, "10¹⁵"), (-2, "−2"),
        (999.9999999999999, "1k"),
    ],
)  # fmt: skip
def test_numbers_as_an_axis_says_them(value, said):
    assert format_number(value) == said


def test_shares_are_per_cent():
    assert [percent(value) for value in (0.0, 0.07, 0.985, 1.0)] == [
        "0\u00a0%",
        "7\u00a0%",
        "98.5\u00a0%",
        "100\u00a0%",
    ]


def test_names_at_the_ends_of_lines_do_not_overlap():
    places = spread_out([50.0, 50.0, 99.0, 0.0, 51.0], 10, 0, 100)
    assert all(b - a > 9.99 for a, b in zip(sorted(places), sorted(places)[1:], strict=False))
    assert min(places) >= -0.01
    assert max(places) <= 100.01
    assert sorted(range(5), key=lambda index: places[index]) == [3, 0, 1, 4, 2]
    assert spread_out([10.0, 60.0], 10, 0, 100) == [10.0, 60.0]
    assert spread_out([], 10, 0, 100) == []


def contrast(a, b):
    """Of two colours, by WCAG 2."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(scheme):
    for name in ("text", "muted", "bn", "plain", "other"):
        assert contrast(getattr(scheme, name), scheme.paper) >= 4.5, name
    for name in ("bn_2", "plain_2", "other_2"):
        assert contrast(getattr(scheme, name), scheme.paper) >= 3, name
