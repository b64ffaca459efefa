import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree.ElementTree import Element, TreeBuilder

import pytest

from batchnorm.records import Evaluation, RecordError, Result, Run, Table, Verdict
from batchnorm.report.page import render
from batchnorm.report.tables import Grid, format_duration, format_share, format_time, number

from . import sample

VOID = {"meta", "link", "br", "hr", "img", "input"}


def text(page):
    """What a reader sees, in order."""
    page = re.sub(r"<(svg|style|head)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", page).replace("\u00a0", " ").split())


def verdict(**changes):
    return sample.VERDICTS[0].model_copy(update=changes)


class Reader(HTMLParser):
    """Checks that elements are closed in order, and collects what the tests ask about; `root` is the page as a tree."""

    def __init__(self, page):
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str | None] = []
        self.targets: list[str] = []
        self.elements: set[str] = set()
        self.tree = TreeBuilder()
        self.feed(page)
        self.close()
        assert self.open == []
        self.root: Element = self.tree.close()

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "srcset", "action", "data", "poster", "xlink:href"):
                self.targets.append(value or "")
            assert not name.startswith("on"), name
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        self.tree.start(tag, {name: value or "" for name, value in attributes})
        if tag not in VOID:
            self.open.append(tag)
        else:
            self.tree.end(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.tree.end(tag)

    def handle_data(self, data):
        if self.open:
            self.tree.data(data)


def text_of(element):
    """What an element says, whatever is set in it in bold or kept on a line."""
    assert element is not None
    return " ".join("".join(element.itertext()).split())


def texts_of(element, path):
    return [text_of(each) for each in element.iterfind(path)]


def facts(element):
    """A list of terms and what is said of them."""
    return dict(zip(texts_of(element, "dl/dt"), texts_of(element, "dl/dd"), strict=True))


def cells(region):
    """A table, its head first, and the columns that stand right, as numbers do."""
    rows = [*region.iterfind("table/thead/tr"), *region.iterfind("table/tbody/tr")]
    right = [[at for at, cell in enumerate(row) if cell.get("class") == "n"] for row in rows]
    assert all(each == right[0] for each in right)
    return [[text_of(cell) for cell in row] for row in rows], right[0]


@pytest.fixture(scope="module")
def page():
    """Of a run that has ended, and has something for every part of the page."""
    return Reader(render([sample.RUN, *sample.results(), sample.figure_1a(), *sample.VERDICTS[:3]])).root


def test_the_head_allows_a_browser_nothing_and_fits_a_phone(page):
    meta = {
        each.get("name") or each.get("http-equiv"): each.get("content") or "" for each in page.iter("meta")
    }
    assert page.find("head/meta").attrib == {"charset": "utf-8"}
    assert meta["viewport"].startswith("width=device-width")
    assert meta["color-scheme"] == "light dark"
    assert meta["Content-Security-Policy"].startswith("default-src 'none'")
    assert texts_of(page, "head/title") == texts_of(page, ".//h1") == [sample.RUN.title]


def test_the_headline_stands_first_with_the_other_ratios(page):
    (headline,) = page.iterfind("body/main/header/div")
    assert headline.get("class") == "headline"
    assert texts_of(headline, ".//strong") == ["15.8×"]
    assert "3 seeds" in text_of(headline)
    assert texts_of(headline, "ul/li") == ["15.8× to 80 %", "13.7× to 85 %", "11.8× to 90 %"]


def test_the_index_leads_to_every_claim(page):
    links = page.findall(".//ol/li/a")
    assert [text_of(link) for link in links] == [verdict.title for verdict in sample.VERDICTS[:3]]
    assert texts_of(page, ".//ol/li/span") == ["Seen", "Seen", "Not seen here"]
    places = [(link.get("href") or "").removeprefix("#") for link in links]
    assert places == [article.get("id") for article in page.iter("article")]


@pytest.mark.parametrize("number", range(3))
def test_a_claim_has_its_outcome_facts_figures_tables_and_choices(page, number):
    verdict, article = sample.VERDICTS[number], list(page.iter("article"))[number]
    assert texts_of(article, "h3") == [verdict.title]
    assert texts_of(article, "p[@class]")[0] == verdict.outcome.capitalize()
    assert list(facts(article).values()) == [verdict.source, verdict.expected, verdict.measured]
    charts = [chart for chart in (sample.figure_1a(),) if chart.claim == verdict.claim]
    assert texts_of(article, "figure/figcaption") == [f"{chart.title}{chart.caption}" for chart in charts]
    widths = [[each.get("class") for each in figure.iter("div") if each.find("svg") is not None]
              for figure in article.iterfind("figure")]  # fmt: skip
    assert widths == [["narrow", "wide"] for _ in charts]
    tables = verdict.tables
    regions = article.findall("div[@role='region']")
    assert [region.get("aria-label", "").replace("\u00a0", " ") for region in regions] == list(tables)
    for region, table in zip(regions, tables.values(), strict=True):
        found, right = cells(region)
        assert found == [table.columns, *table.rows]
        assert right == list(range(1, len(table.columns)))  # all but the names are numbers
    assert texts_of(article, "p[@class='note']") == [table.note for table in tables.values() if table.note]
    assert texts_of(article, "ul/li") == verdict.choices


def test_each_network_has_a_row_that_says_how_it_ended(page):
    (section,) = [each for each in page.iter("section") if texts_of(each, "h2") == ["Networks"]]
    (head, *rows), right = cells(section.find("div"))
    assert head == ["network", "steps", "test", "moving", "training", "loss", "time", "ended"]
    assert right == list(range(1, 7))
    assert [row[0] for row in rows] == [result.job for result in sample.results()]
    assert rows[0][1:] == ["50,000", "96.20 %", "96.05 %", "99.95 %", "0.0021", "1 min 22 s", "yes"]
    assert rows[-1][1:] == ["310", "9.85 %", "—", "10.12 %", "∞", "0.6 s", "diverged"]
    meanings = text_of(section.find("p[@class='note']")).split("; ")
    assert [each.split(":")[0].lower() for each in meanings] == ["test", "moving", "training", "loss"]
    (head, *rows), right = cells(section.find("details/div"))
    assert head == ["network", "batch_norm", "learning_rate", "seed"]  # init_std is the same in all
    assert rows[0] == ["bn-lr0.1-seed0", "yes", "0.1", "0"]
    assert rows[-1] == ["plain-lr10-seed0", "no", "10", "0"]
    assert len(rows) == len(sample.results())


def test_it_ends_with_how_it_was_made(page):
    section, run = list(page.iter("section"))[-1], sample.RUN
    assert texts_of(section, "pre") == [run.command]
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    assert facts(section) == {
        "Experiment": run.experiment, "Started": "2026-03-01, 09:30 UTC", "Machine": run.machine,
        "Seeds": "0, 1, 2", "Versions": versions,
    }  # fmt: skip
    assert json.loads(text_of(section.find("details/pre"))) == run.config


@pytest.mark.parametrize(
    "records",
    [sample.complete(), sample.interrupted(), [sample.RUN]],
    ids=["complete", "interrupted", "only begun"],
)
def test_is_a_sound_page_that_asks_for_nothing(records):
    page = render(records)
    assert page == render(records)
    assert page.lstrip().startswith('<!DOCTYPE html>\n<html lang="en">')
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert all(t == "data:," or t.removeprefix("#") in reader.ids for t in reader.targets), reader.targets
    assert not reader.elements & {"script", "img", "iframe", "object", "embed", "video", "audio", "form"}
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    levels = reader.headings
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


@pytest.mark.slow
def test_says_things_in_order():
    said = text(render(sample.complete()))
    places = [
        said.index(part)
        for part in (
            sample.RUN.title, "15.8× fewer steps to 80 % test accuracy with batch normalization", "The claims",
            "Section 4.1, figure 1", "at least 10 times", "With batch normalization 80 % took", "Figure 1(a) of",
            "Steps to an accuracy",
            "What the paper leaves open", "Networks", "How this page was made",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert f"{sample.RUN.command} --resume" in said  # one claim of the sample is incomplete


def test_words_cannot_become_markup():
    evil = "</style></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;{{ run }}{% raw %}"
    run = sample.RUN.model_copy(
        update={
            "title": evil, "command": evil, "machine": evil, "experiment": evil, "started": evil,
            "versions": {evil: evil}, "config": {evil: [evil]},
        }
    )  # fmt: skip
    table = Table(columns=[evil, evil], rows=[[evil, evil]], note=evil)
    judged = verdict(
        claim=evil,
        title=evil,
        source=evil,
        expected=evil,
        measured=evil,
        choices=[evil],
        tables={evil: table},
        steps_ratio={evil: 1.0},
    )
    chart = sample.figure_1a()
    panel = chart.panels[0].model_copy(update={"title": evil, "x_label": evil, "y_label": evil})
    chart = chart.model_copy(update={"claim": evil, "title": evil, "caption": evil, "panels": [panel]})
    network = sample.results()[0].model_copy(update={"job": evil, "config": {"a": evil}})
    page = render([run, judged, chart, network, sample.results()[1]])
    assert not Reader(page).elements & {"script", "img"}
    assert text(page).count("&lt;script&gt;") > 15
    assert "{{ run }}" in page


def test_the_last_of_a_name_wins_in_the_place_of_the_first():
    first, second = sample.VERDICTS[1], sample.VERDICTS[2]
    again = first.model_copy(update={"measured": "measured anew", "outcome": "not seen here"})
    chart = sample.sweep()
    redrawn = chart.model_copy(update={"caption": "drawn anew"})
    said = text(render([sample.RUN, chart, first, second, redrawn, again]))
    assert first.measured not in said
    assert chart.caption not in said
    assert said.count("measured anew") == said.count("drawn anew") == 1
    assert said.index("measured anew") < said.index(second.measured)


def test_an_interrupted_run_says_so_and_how_to_go_on():
    said = text(render(sample.interrupted()))
    assert "No verdict yet" in said
    assert "3 networks have ended, 3 under way." in said
    assert f"{sample.RUN.command} --resume" in said
    assert "Test accuracy so far" in said
    assert "not yet" in said
    resumed = sample.RUN.model_copy(update={"command": "batchnorm reproduce mnist --resume"})
    assert "--resume --resume" not in text(render([resumed]))


def test_a_chart_without_a_verdict_is_shown_all_the_same():
    page = render([sample.RUN, sample.figure_1a()])
    assert page.count('<svg class="plot"') == 2  # for a phone and for a desk
    assert "Figure 1(a) of the paper" in page


def test_the_progress_of_few_networks_names_each():
    cut = [e for e in sample.evaluations() if e.job.endswith("seed0")]
    page = render([sample.RUN, *cut])
    assert ">bn-lr0.1-seed0</text>" in page
    assert "stroke: var(--plain)" in page
    page = render([sample.RUN, *sample.evaluations()])
    assert ">with batch normalization (3)</text>" in page


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ({"80": 12.0, "90": 20.04}, "20.0× fewer steps to 90 % test accuracy"),
        (
            {"50": 99.0, "80": 12.0},
            "12.0× fewer steps to 80 % test accuracy",
        ),  # the claim is about 80 % or more
        ({"50": 9.0, "70": 3.0}, "3.0× fewer steps to 70 % test accuracy"),
        ({"97.5": 1234.4}, "1,234× fewer steps to 97.5 % test accuracy"),
        ({"80": 0.5}, "2.0× more steps to 80 % test accuracy"),
        ({"80": math.inf, "85": math.nan, "90": 3.0}, "3.0× fewer steps to 90 %"),
        ({"80": math.inf}, "Seen Batch normalization makes the network"),
        ({}, "Seen Batch normalization makes the network"),
        (None, "Seen Batch normalization makes the network"),
    ],
)
def test_the_headline(ratios, said):
    assert said in text(render([sample.RUN, verdict(steps_ratio=ratios)]))


def test_the_headline_counts_several_claims():
    judged = [v.model_copy(update={"steps_ratio": None}) for v in sample.VERDICTS]
    assert "2 of 3 claims of the paper seen here" in text(render([sample.RUN, *judged]))
    assert "No verdict yet" in text(render([sample.RUN, judged[3]]))


def test_the_verdict_with_the_headline_comes_first():
    said = text(render([sample.RUN, sample.VERDICTS[1], sample.VERDICTS[0]]))
    assert said.index(sample.VERDICTS[0].title) < said.index(sample.VERDICTS[1].title)


def test_a_finished_run_is_not_told_to_go_on():
    assert "--resume" not in render([sample.RUN, *sample.VERDICTS[:3]])


@pytest.mark.slow
def test_numbers_that_are_none():
    result = Result(
        job="lost", config={}, steps=3, diverged=True, loss=math.nan, accuracy=math.nan, train_accuracy=math.inf,
        seconds=math.inf,
    )  # fmt: skip
    evaluation = Evaluation(
        job="late", step=1, loss=math.inf, accuracy=0.1, accuracy_moving=None, percentiles=None, travel=None
    )
    said = text(render([sample.RUN, result, evaluation]))
    assert "lost 3 not a number — ∞ not a number ∞ diverged".replace(" —", "") in said
    assert "late 1 10.00 % — ∞ — not yet" in said


def test_many_networks_start_folded():
    networks = [sample.results()[0].model_copy(update={"job": f"job-{i}"}) for i in range(31)]
    assert "All 31 networks" in render([sample.RUN, *networks])
    assert "All 30 networks" not in render([sample.RUN, *networks[:30]])


def test_settings_that_differ_are_told():
    said = text(render([sample.RUN, *sample.results()]))
    assert "network batch_norm learning_rate seed bn-lr0.1-seed0 yes 0.1 0" in said
    assert "settings differ" not in text(render([sample.RUN, sample.results()[0]]))


def test_records_without_a_run_are_refused():
    with pytest.raises(RecordError, match="name no run"):
        render([sample.VERDICTS[0]])


def test_numbers_stand_right_and_words_left():
    columns = ["name", "count", "some missing", "word", "mixed"]
    rows = [
        ["1", "1,990", "15.8 ± 0.2", "yes", "3 of 4 seeds"],
        ["2", "−3", "not reached", "no", "all of them"],
        ["3", "<5", "—", "", "none"],
    ]
    grid = Grid("", columns, rows)
    assert [grid.numeric(column) for column in range(5)] == [False, True, True, False, False]
    assert not Grid("", ["a", "b"], [["ragged"]]).numeric(1)
    assert Grid("", ["a", "b"], [["x", "not reached"], ["y", "–"]]).numeric(1)


def test_small_words():
    assert format_time("2026-03-01T09:30:00+02:00") == "2026-03-01, 07:30 UTC"
    assert format_time("2026-03-01T09:30:00") == "2026-03-01T09:30:00"
    assert format_time("yesterday") == "yesterday"
    assert [format_duration(s).replace("\u00a0", " ") for s in (0.64, 42, 59.7, 125, 7380)] == [
        "0.6 s",
        "42 s",
        "1 min 00 s",
        "2 min 05 s",
        "2 h 03 min",
    ]
    assert [number(v) for v in (0.0, 0.00213, 2.3e-7, -1.5, 1234.5, 3e9, None, -math.inf)] == [
        "0",
        "0.00213",
        "2.3e−7".replace("e−7", "e−07"),
        "−1.5",
        "1,234",
        "3.0e+09",
        "",
        "−∞",
    ]
    assert format_share(None) == ""


def test_outcomes_differ_by_more_than_colour():
    marks = set()
    for outcome in ("seen", "not seen here", "incomplete"):
        page = render(
            [sample.RUN, Verdict.model_validate({**sample.VERDICTS[1].model_dump(), "outcome": outcome})]
        )
        assert f">{outcome.capitalize()}<" in re.sub(r"</svg>", "<>", page).replace("<>", ">")
        found = re.search(r'<svg class="mark".*?</svg>', page, re.DOTALL)
        assert found
        marks.add(found[0])
    assert len(marks) == 3


def test_a_run_without_claims_is_about_its_network():
    head = Run(
        experiment="train",
        title="bn-inception on digits",
        command="batchnorm train run.toml --out a",
        config={},
        seeds=[0],
        versions={},
        machine="m",
        started="2026-01-01T00:00:00+00:00",
    )
    looks = [Evaluation(job="network", step=step, loss=1.0, accuracy=step / 100) for step in (20, 30)]
    result = Result(
        job="network",
        config={},
        steps=30,
        diverged=False,
        loss=1.0,
        accuracy=0.3,
        accuracy_moving=0.25,
        seconds=1.0,
    )
    stopped, ended = render([head, *looks]), render([head, *looks, result])
    for page in (stopped, ended):
        assert "30.00\u00a0%" in page
        assert "of the validation images right after 30 steps" in page
        assert "verdict" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower()
    assert "batchnorm train run.toml --out a --resume" in stopped
    assert "The run has not come to its end." in stopped
    assert "--resume" not in ended
    assert "25.00\u00a0% by the moving averages" in ended
    assert "Not evaluated yet" in render([head])
