"""The page of an examination: what it says, that nothing in it can become markup, and that it stays small."""

import math
import re
import time
from dataclasses import replace
from itertools import pairwise
from xml.etree.ElementTree import fromstring

import pytest

from batchnorm.report.bars import Bar, Words, drawn, svg
from batchnorm.report.doctor_page import render
from batchnorm.report.examined import THE_MODEL, Examined, Explained, Layer, Shift, sentence
from batchnorm.report.layer_tree import layer_tree

from . import doctor_sample
from .doctor_sample import CHECKS, PATHS, row
from .test_page import Reader, facts, text, text_of, texts_of


class Page(Reader):
    """The places where a path may break are no elements of it."""

    def handle_starttag(self, tag, attributes):
        if tag != "wbr":
            super().handle_starttag(tag, attributes)


def section(root, name):
    """The section with this heading."""
    (found,) = [each for each in root.iter("section") if texts_of(each, "h2") == [name]]
    return found


def findings(root):
    return [each for each in section(root, "Findings").iter("article") if each.get("class") == "finding"]


@pytest.fixture(scope="module")
def root():
    return Page(render(doctor_sample.watched())).root


def test_it_begins_with_the_model_and_how_much_was_found(root):
    assert texts_of(root, "head/title") == texts_of(root, ".//h1") == ["torchvision:resnet50"]
    (header,) = root.iterfind(".//main/header")
    assert texts_of(header, ".//strong") == ["12"]
    assert texts_of(header, ".//ul/li") == [
        "2 errors", "10 warnings", "53 infos", "2 fixed", "3 checks not made", "53 layers",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("severities", "number", "says"),
    [
        ("ew", ["2"], "2 errors and warnings"),
        ("e", ["1"], "1 error"),
        ("wwi", ["2"], "2 warnings"),
        ("i", ["1"], "1 info, and nothing serious"),
        ("", [], "Nothing was found"),
    ],
)
def test_the_headline_counts_what_is_serious(severities, number, says):
    kinds = {"e": "error", "w": "warning", "i": "info"}
    rows = [row("BN201", "a", "wrong", severity=kinds[each]) for each in severities]
    root = Page(render(Examined("m", rows))).root
    assert texts_of(root, ".//header//strong") == number
    assert texts_of(root, ".//header//p") == [says]


def test_the_headline_of_a_model_that_was_mended_and_of_a_training_that_was_only_watched():
    examined = doctor_sample.watched()
    mended = Page(render(Examined("m", fixed=examined.fixed))).root
    assert texts_of(mended, ".//header//p") == ["Nothing is left to mend"]
    watched = Page(render(Examined("m", shift=examined.shift))).root
    assert texts_of(watched, ".//header//p") == ["What came to 53 layers in 1,000 steps"]


def test_every_finding_is_told_with_its_evidence_and_its_fix_the_worst_first(root):
    expected = doctor_sample.examined().worst_first
    found = findings(root)
    assert len(found) == len(expected) == 65
    for article, each in zip(found, expected, strict=True):
        assert texts_of(article, "h4") == [each["layer"] or THE_MODEL]
        assert texts_of(article, "p") == [each["message"]]
        assert texts_of(article, "pre") == [each["fix"]]
        names = texts_of(article, "table/tbody/tr/th")
        assert names == [name.replace("_", " ") for name in each["evidence"]]
    evidence = {text_of(tr[0]): text_of(tr[1]) for tr in found[2].iter("tr")}
    assert evidence == {"gap": "0.639", "by chance": "0.04", "channels": "17"}
    levels = ["error", "warning", "info"]
    marks = [
        levels.index(text_of(each).lower())
        for each in root.iter("p")
        if "outcome" in (each.get("class") or "")
    ]
    assert marks == sorted(marks) == [0, 0, 1, 1, 2]


def test_a_check_is_explained_once_with_its_source(root):
    checks = [each for each in section(root, "Findings").iter("section") if each.get("class") == "check"]
    names = [texts_of(each, "h3")[0] for each in checks]
    assert names == [
        "BN101 evaluation-depends-on-the-batch", "BN302", "BN405 stale-statistics", "BN201 momentum",
        "BN206 weight-decay",
    ]  # fmt: skip
    for name, each in zip(names, checks, strict=True):
        about = CHECKS.get(name[:5])
        if about is None:
            assert each.find("details") is None
            continue
        assert about.symptom in texts_of(each, "p")
        assert facts(each.find("details")) == {"What happens": about.why, "Known from": about.source}


def test_of_many_findings_of_a_check_the_first_are_seen_and_all_are_there(root):
    (check,) = [each for each in root.iter("section") if texts_of(each, "h3") == ["BN206 weight-decay"]]
    assert len(check.findall("article")) == 4
    (folded,) = [each for each in check.iterfind("details") if each.find("article") is not None]
    assert texts_of(folded, "summary") == ["49 more"]
    assert len(folded.findall("article")) == 49
    few = Page(render(Examined("m", [row("BN206", str(at), "so") for at in range(5)]))).root
    assert len(few.findall(".//section/article")) == 5


def leaves(branches, above=""):
    """The paths of a tree on the page, by what is written on its branches."""
    for li in branches.iterfind("li"):
        details = li.find("details")
        if details is None:
            leaf = li.find("div")
            name = text_of(leaf[0])
            yield above + name, leaf
        else:
            name = (details.find("summary").text or "").strip()
            yield from leaves(details.find("ul"), f"{above}{name}.")


def test_the_layers_stand_at_the_side_nested_as_the_modules_are(root):
    (nav,) = root.iter("nav")
    assert nav.get("aria-label") == "Layers"
    found = dict(leaves(nav.find("details/ul")))
    assert list(found) == [THE_MODEL, *PATHS]
    ids = {each.get("id"): each for each in root.iter() if each.get("id")}
    rows = doctor_sample.examined().worst_first
    for path, leaf in found.items():
        links = leaf.findall("a")
        if path != THE_MODEL:
            to_layer, *links = links
            assert to_layer.get("aria-label") == path
            assert text_of(ids[to_layer.get("href")[1:]].find("th")) == path
        there = [each for each in rows if (each["layer"] or THE_MODEL) == path]
        assert [text_of(each) for each in links] == [each["code"] for each in there]
        for link, each in zip(links, there, strict=True):
            assert link.get("aria-label") == f"{each['code']}: {each['severity']} at {path}"
            assert texts_of(ids[link.get("href")[1:]], "p") == [each["message"]]
    opened = [
        text_of(each.find("summary")).split()[0] for each in nav.iter("details") if "open" in each.attrib
    ]
    assert opened == ["layer3", "1", "2", "3", "4", "layer4", "2"]  # where something serious is
    (summary,) = [each for each in nav.iter("summary") if each.text == "layer4"]
    assert text_of(summary).split(None, 1)[1] == "11 findings, the worst: error"


@pytest.mark.parametrize(
    ("paths", "tree"),
    [
        (["a.b.c", "a.b.d"], ["a.b", ["c", "d"]]),
        (["a.b", "a.b.c", "a.d"], ["a", ["b*", ["c"], "d"]]),
        (["", "a"], ["", "a"]),
        (["a", "b", "a"], ["a", "b"]),
        (["a.1.x", "b", "a.2.x"], ["a", ["1.x", "2.x"], "b"]),
        ([".".join("abcdefghijklmnop") + each for each in (".x", ".y")], 
         ["a.b.c.d.e.f.g.h.i.j.k", ["l.m.n.o.p.x", "l.m.n.o.p.y"]]),
    ],
)  # fmt: skip
def test_a_tree_of_paths(paths, tree):
    def shown(branches):
        found: list[object] = []
        for each in branches:
            found.append(each.name + "*" * bool(each.is_layer and each.below))
            found += [shown(each.below)] if each.below else []
        return found

    assert shown(layer_tree(paths)) == tree


def test_a_path_of_any_depth_is_a_tree_of_bounded_depth():
    paths = [".".join(["a", "b"] * depth + ["c"]) for depth in range(500)]
    root = Page(render(Examined("m", layers=[Layer(path, "BatchNorm1d(3)") for path in paths]))).root
    assert [path for path, _ in leaves(root.find(".//nav/details/ul")) if path.endswith("c")]
    depths = [len(list(filter(None, each.name.split(".")))) for each in layer_tree(paths)]
    assert len(depths) <= 2


def test_the_gap_of_each_layer_is_a_bar_with_the_level_of_chance(root):
    figure = section(root, "Training and evaluation").find("figure")
    for width in ("narrow", "wide"):
        (picture,) = [each for each in figure.iter("div") if each.get("class") == width]
        rects = [each for each in picture.iter("rect") if each.find("title") is not None]
        assert [text_of(each.find("title")).split(":")[0] for each in rects] == PATHS
        assert text_of(rects[29].find("title")) == "layer3.1.bn2: 0.639, by chance 0.04"
        heights = [float(each.get("height")) for each in rects]
        gaps = [doctor_sample.gap(number) for number in range(53)]
        scale = heights[29] / gaps[29]
        assert all(
            height == pytest.approx(gap * scale, abs=0.8) for height, gap in zip(heights, gaps, strict=True)
        )
        marked = [number for number, each in enumerate(rects) if "--plain" in each.get("style", "")]
        assert marked == [*range(29, 38), 52]
        texts = texts_of(picture, "svg/text")
        assert {"layer3.1.bn2 0.639", "layer1", "layer4", "by chance", "standard deviations"} <= set(texts)
        label = picture.find("svg").get("aria-label")
        assert "the highest: layer3.1.bn2, 0.639" in label
        assert picture.find("svg").get("role") == "img"


def test_without_gaps_there_is_no_figure_of_them():
    page = render(replace(doctor_sample.examined(), layers=[Layer("bn1", "BatchNorm2d(64)")]))
    assert "Training and evaluation" not in page
    assert "by chance</th>" not in page.split("Layers</h2>")[1]


def test_bars_of_numbers_that_are_none_and_without_any():
    words = Words("values", "plain", "marked", "level")
    found = drawn(
        [Bar("a", math.nan), Bar("b", math.inf, math.inf), Bar("c", 0.0, math.nan), Bar("d", 1e-9, 0.5)]
    )
    assert [bar.path for bar in found] == ["b", "c", "d"]
    picture = svg(found, (360.0, 300.0), words, "label")
    assert "b: ∞, level ∞" in picture
    assert not re.search(r'(d|x|y|width|height)="[^"]*(nan|inf)', picture)
    assert re.findall(r' d="(M[^"]*H[^"]*)"', picture)[0].count("H") == 1  # the level of d alone
    assert svg([Bar("a", 0.0)], (360.0, 300.0), words, "label").count("<rect") == 2  # in the legend too


def test_a_value_out_of_all_bounds_is_cut_and_does_not_flatten_the_others():
    words = Words("values", "plain", "marked", "level")
    root = fromstring(
        svg([Bar("a", 3.7e13), Bar("b", 2.5), Bar("c", math.inf)], (360.0, 300.0), words, "label")
    )
    first, second, third = (
        float(each.get("height", "")) for each in root.iter("rect") if each.find("title") is not None
    )
    assert first == third == pytest.approx(2 * second, abs=0.02)
    assert len([each for each in root.iter("path") if each.get("class") == "cut"]) == 2
    assert "a 3.7·10¹³" in texts_of(root, "text")


def test_what_is_written_in_a_figure_is_no_markup():
    evil = "<b>&\"'\x00"
    words = Words(evil, evil, evil, evil)
    picture = svg([Bar(evil, 2.0, 0.5), Bar(f"{evil}.a", 1.0, marked=True)], (360.0, 300.0), words, evil)
    root = fromstring(picture)  # also that it is well-formed
    assert {each.tag for each in root.iter()} == {"svg", "path", "rect", "title", "text"}
    texts = texts_of(root, "text")
    assert "<b>&\"' 2" in texts and texts.count("<b>&\"'") >= 4


def test_of_thousands_of_bars_the_highest_are_drawn_in_their_order():
    found = drawn([Bar(str(number), float(number % 1000)) for number in range(5000)])
    assert len(found) == 400
    assert min(bar.value for bar in found) == 920
    assert [int(bar.path) for bar in found] == sorted(int(bar.path) for bar in found)


def test_what_comes_to_layers_over_time_is_a_picture_each(root):
    figures = section(root, "Distributions over time").findall("figure")
    drift, course = figures
    assert "standard deviations from look to look" in texts_of(drift, ".//svg/text")
    titles = texts_of(course, ".//div[@class='panel']/p/code")
    assert len(titles) == 24 and titles == [path for path in PATHS if path in titles]
    serious = [
        each["layer"]
        for each in doctor_sample.examined().findings
        if each["severity"] != "info" and each["layer"]
    ]
    assert set(serious) <= set(titles)
    assert len(course.findall("div/div")) == 6
    assert texts_of(course, "details/summary") == ["18 more layers"]
    assert "29 more are left out" in text_of(course.find("figcaption"))
    for picture in course.iter("svg"):
        said = " ".join(text_of(each) for each in picture.iter("text"))
        assert {"85th", "median", "15th"} <= set(said.split())
        assert "percentile of its input" in picture.get("aria-label", "")


def test_what_was_fixed_is_told_before_and_after(root):
    fixed = section(root, "Fixed")
    assert texts_of(fixed, "section/h3") == ["BN201 momentum"]
    assert texts_of(fixed, "section/article/h4") == ["layer1.0.bn1", "layer1.0.bn2"]
    for article in fixed.iter("article"):
        before = "momentum is 0: its running statistics never move"
        assert facts(article) == {"Before": before, "Done": "momentum 0 → 0.1"}


def test_what_was_not_checked_is_told_by_reason(root):
    assert facts(section(root, "Not checked")) == {
        "it needs the optimizer: examine(model, optimizer=optimizer)": "BN203, BN204",
        "it needs training steps: with bn.watch(model, optimizer)": "BN301",
    }


def test_the_table_has_every_layer_with_its_numbers_and_findings(root):
    table = section(root, "Layers").find("details/div/table")
    head, *rows = [[text_of(cell) for cell in tr] for tr in table.iter("tr")]
    assert head == ["layer", "findings", "gap", "by chance", "values", "noise", "kind"]
    assert [each[0] for each in rows] == PATHS
    assert rows[29] == [
        "layer3.1.bn2",
        "BN405 BN201 BN206",
        "0.639",
        "0.04",
        "1,568",
        "0.059",
        "BatchNorm2d(256)",
    ]


def test_it_ends_with_how_it_was_made(root):
    made = section(root, "How this page was made")
    assert texts_of(made, "pre") == [doctor_sample.examined().command]
    versions = "batchnorm 0.1.0, torch 2.14.1+cpu, python 3.11.9"
    assert facts(made) == {"Date": "2026-03-01, 09:30 UTC", "Versions": versions}
    assert list(root.iter("section"))[-1] is made


@pytest.mark.parametrize(
    "examined",
    [
        doctor_sample.watched(),
        doctor_sample.examined(),
        Examined("m"),
        Examined("", layers=[Layer("", "BatchNorm1d")]),
    ],
    ids=["watched", "examined", "nothing", "a layer alone"],
)
def test_is_a_sound_page_that_asks_for_nothing(examined):
    page = render(examined)
    assert page == render(examined)
    assert page.lstrip().startswith('<!DOCTYPE html>\n<html lang="en">')
    reader = Page(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert all(t == "data:," or t.removeprefix("#") in reader.ids for t in reader.targets), reader.targets
    assert not reader.elements & {"script", "img", "iframe", "object", "embed", "video", "audio", "form"}
    assert set(re.findall(r"url\((.)", page)) <= {"#"} and "@import" not in page
    levels = reader.headings
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    described = {each.get("aria-labelledby") for each in reader.root.iter() if each.get("aria-labelledby")}
    assert described <= set(reader.ids)


EVIL = "</style></title></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;{{ examined }}{% raw %}"


def test_words_cannot_become_markup():
    path = EVIL.replace(".", "")
    evil = row("BN201", path, EVIL, EVIL, **{EVIL: EVIL})
    alien = row(EVIL, f"{path}.{path}", EVIL, EVIL, "info")
    examined = Examined(
        title=EVIL, findings=[evil, alien, *[row("BN206", f"{path}.a.{path}", EVIL, EVIL)] * 7],
        fixed=[{**evil, "change": EVIL}], skipped={EVIL: EVIL, "BN9": EVIL},
        layers=[Layer(path, EVIL, 0.5, 0.1, 3, 0.2), Layer(f"{path}.b", EVIL, 0.1)],
        checks={"BN201": Explained(EVIL, "warning", EVIL, EVIL, EVIL), EVIL: Explained(EVIL, "info", EVIL, EVIL, EVIL)},
        shift=[Shift(path, [1.0, 2.0], [0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [0.0, 0.1])],
        command=EVIL, versions={EVIL: EVIL}, date=EVIL,
    )  # fmt: skip
    page = render(examined)
    reader = Page(page)
    assert not reader.elements & {"script", "img"}
    assert page.count("&lt;script&gt;") > 60
    assert "{{ examined }}" in page
    assert EVIL in texts_of(reader.root, ".//h1") or text_of(reader.root.find(".//h1")) == " ".join(
        EVIL.split()
    )


def test_letters_that_no_file_can_hold_are_replaced():
    page = render(
        Examined(
            "m\udcff", [row("BN201", "a\udcff\x00b", "c\ud800")], layers=[Layer("a\udcff\x00b", "", 0.1)]
        )
    )
    assert "m?" in page and page.encode()
    Page(page)


def test_thousands_of_layers_and_findings_are_bounded_and_said_to_be():
    layers = [
        Layer(f"block{number // 50}.{number}.bn", "BatchNorm2d(64)", 0.1, 0.02, 9, 0.1)
        for number in range(20_000)
    ]
    rows = [row("BN405", layers[-1 - number].path, "so", "do", "warning", gap=0.5) for number in range(3_000)]
    steps = [float(step) for step in range(2_000)]
    shifts = [Shift(layer.path, steps, steps, steps, steps, steps) for layer in layers[:300]]
    fixed = [{**each, "change": "1 → 2"} for each in rows]
    started = time.monotonic()
    page = render(Examined("m", rows, fixed, layers=layers, checks=CHECKS, shift=shifts))  # type: ignore[arg-type]
    assert time.monotonic() - started < 30
    assert len(page) < 6_000_000
    reader = Page(page)
    assert len(findings(reader.root)) == 1_000
    said = text(page)
    assert "2,000 more are left out: --json has all of them." in said.replace(" :", ":")
    assert "18,000 more without findings are left out." in said
    assert "276 more are left out." in said
    table = section(reader.root, "Layers")
    paths = texts_of(table, ".//tbody/tr/th")
    assert len(paths) == 2_000 and layers[-1].path in paths
    order = {layer.path: number for number, layer in enumerate(layers)}
    assert [order[path] for path in paths] == sorted(order[path] for path in paths)
    (nav,) = reader.root.iter("nav")
    assert len(list(nav.iter("details"))) < 500


def test_a_sentence_ends_before_its_fix():
    assert sentence(row("BN201", "a", "wrong", "do()")) == "wrong. do()"
    assert sentence(row("BN201", "a", "wrong?", "do()")) == "wrong? do()"
    assert sentence(row("BN201", "a", "wrong")) == "wrong."


def test_what_diagnostics_makes_is_what_is_rendered():
    import torch

    import batchnorm as bn

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8, momentum=0.99))
    found = bn.examine(model, select=["BN201"])
    root = Page(render(Examined.of("Sequential", found.as_dict(), command="examine"))).root
    (article,) = findings(root)
    assert texts_of(article, "p") == [found[0].message]
    assert texts_of(article, "pre") == [found[0].fix]


def test_layers_as_json_has_them():
    rows = [
        {"path": "a", "kind": "BatchNorm1d(3)", "gap": 0.5, "by_chance": "inf", "values": 4, "noise": "nan"},
        {"path": "nan.b", "kind": "nan-like"},
    ]
    found = {"findings": [], "fixed": [], "skipped": {}, "layers": rows}
    one, other = Examined.of("m", found).layers
    assert (one.gap, one.by_chance, one.values) == (0.5, math.inf, 4) and math.isnan(one.noise or 0)
    assert other == Layer("nan.b", "nan-like")
    root = Page(render(Examined.of("m", found))).root
    _, first, second = section(root, "Layers").iter("tr")
    assert [text_of(cell) for cell in first] == ["a", "", "0.5", "∞", "4", "not a number", "BatchNorm1d(3)"]
    assert [text_of(cell) for cell in second] == ["nan.b", "", "—", "—", "—", "—", "nan-like"]
