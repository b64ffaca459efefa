"""The page of an examination in a real browser: on a phone and a desk, in light and dark, by keyboard, to a reader."""

import pytest

from batchnorm.report.doctor_page import render
from batchnorm.report.examined import THE_MODEL, Examined, Layer

from . import doctor_sample
from .chromium import BROWSER, browser
from .doctor_sample import PATHS, row
from .test_browser import MEASURE

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path"
)
PHONE, DESK = 390, 1280
# what MEASURE finds in a frame, of the page itself; `opened` folds nothing
LOOK = (
    "(() => {" + MEASURE.partition("addEventListener")[0] + "; window.clientWidth = innerWidth;"
    " window.contentDocument = document; window.contentWindow = window; return measure(window); })()"
)
FOCUSED = """(() => {
  const at = document.activeElement, box = at.getBoundingClientRect();
  return {tag: at.tagName, name: at.getAttribute("aria-label") || at.textContent.trim(), href: at.getAttribute("href"),
    seen: box.bottom > 0 && box.top < innerHeight && box.width > 0, outline: getComputedStyle(at).outlineStyle};
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser."""
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render(doctor_sample.watched()), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [320, PHONE, 768, 1024, DESK, 1920])
def test_reads_well_at_every_width_in_light_and_in_dark(page, file, width):
    seen = {}
    for dark in (False, True):
        page.show(file, width, dark)
        found = seen[dark] = page.evaluate(LOOK)
        assert found["dark"] is dark
        assert found["reach"] <= width
        assert found["outside"] == []
        assert found["loaded"] == []
        assert found["pictures"] > 20
        assert found["worst"]["contrast"] >= 4.5, found["worst"]
        assert found["letters"] >= 9.5 if width == 320 else found["letters"] >= 10
    assert seen[False]["paper"] != seen[True]["paper"]
    assert seen[False]["ink"] != seen[True]["ink"]


def test_words_of_any_length_stay_on_a_phone(page, tmp_path):
    long = "x" * 300
    path = f"{long}.{long}.bn"
    examined = Examined(
        long, [row("BN405", path, long, long, gap=0.3, **{long: long}), row(long, "", long, severity="info")],
        fixed=[{**row("BN201", path, long), "change": long}], skipped={"BN1": long},
        layers=[Layer(path, long, 0.5, 0.1, 3), Layer(f"{long}.b", long, 0.1)],
        command=long, versions={long: long}, shift=[doctor_sample.shift(path, 1)],
    )  # fmt: skip
    (tmp_path / "page.html").write_text(render(examined))
    for width in (PHONE, DESK):
        page.show(tmp_path / "page.html", width)
        found = page.evaluate(LOOK)
        assert found["reach"] <= width
        assert found["outside"] == []


def test_the_layers_are_folded_above_the_page_on_a_phone_and_beside_it_on_a_desk(page, file):
    place = (
        "(selector => { const box = document.querySelector(selector).getBoundingClientRect();"
        " return [box.left, box.top, box.right, box.bottom]; })"
    )
    page.show(file, PHONE)
    nav, main = (page.evaluate(f"{place}({name!r})") for name in ("nav", "main"))
    assert nav[3] <= main[1] and nav[3] < 100
    page.show(file, DESK)
    nav, main = (page.evaluate(f"{place}({name!r})") for name in ("nav", "main"))
    assert nav[2] <= main[0] and nav[1] == main[1] == 0
    page.evaluate("scrollTo(0, 5000)")
    assert page.evaluate(f"{place}('nav')")[1] == 0  # it stays


def tabbed(page, number):
    found = []
    for _ in range(number):
        page.press("Tab", 9)
        found.append(page.evaluate(FOCUSED))
    return found


def test_by_keyboard_every_layer_is_reached_and_seen_where_it_is(page, file):
    page.show(file, DESK)
    first, *stops = tabbed(page, 60)
    assert first["name"] == "To the findings" and first["href"] == "#main"
    assert all(stop["seen"] and stop["outline"] != "none" for stop in [first, *stops])
    layers = [stop["name"] for stop in stops if (stop["href"] or "").startswith("#layer-")]
    assert layers[:3] == ["bn1", "layer3.1.bn1", "layer3.1.bn2"]  # the folded ones are left out
    assert "BN405: warning at layer3.1.bn2" in [stop["name"] for stop in stops]
    assert [stop["name"].split()[0] for stop in stops if stop["tag"] == "SUMMARY"][:2] == ["layer1", "layer2"]


def test_by_keyboard_a_module_is_opened_and_a_finding_gone_to(page, file):
    page.show(file, DESK)
    while not page.evaluate(FOCUSED)["name"].startswith("layer1"):
        page.press("Tab", 9)
    page.press("Enter", 13, "\r")
    assert page.evaluate("document.activeElement.parentElement.open")
    assert page.evaluate("(document.querySelectorAll('nav details:not([open])').length)") > 0
    page.press("Tab", 9)
    page.press("Enter", 13, "\r")  # layer1.0
    page.press("Tab", 9)
    assert page.evaluate(FOCUSED)["name"] == "layer1.0.bn1"
    page.press("Enter", 13, "\r")
    # the table is folded: the browser opens it where the link leads
    assert page.evaluate("location.hash") == "#layer-2"
    assert page.evaluate("document.querySelector('#layer-2').closest('details').open")


def test_on_a_phone_the_layers_are_opened_by_keyboard(page, file):
    page.show(file, PHONE)
    stops = tabbed(page, 3)
    assert [stop["name"] for stop in stops[:2]] == ["To the findings", "53 layers"]
    assert stops[2]["href"] == "#check-1"
    page.show(file, PHONE)
    tabbed(page, 2)
    page.press("Enter", 13, "\r")
    assert [stop["name"] for stop in tabbed(page, 2)] == [f"BN302: error at {THE_MODEL}", "bn1"]


def test_a_screen_reader_finds_landmarks_and_a_name_for_everything(page, file):
    page.show(file, DESK)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    found = page.accessible()
    by_role: dict[str, list[str]] = {}
    for role, name in found:
        by_role.setdefault(role, []).append(name)
    assert by_role["navigation"] == ["Layers"]
    assert len(by_role["main"]) == 1
    assert by_role["RootWebArea"] == ["torchvision:resnet50"]
    assert {
        "Findings",
        "Training and evaluation",
        "Distributions over time",
        "Fixed",
        "Layers",
        "Not checked",
    } <= set(by_role["region"])
    assert set(PATHS) <= set(by_role["link"])
    for role in ("link", "heading", "region", "image", "table", "DisclosureTriangle"):
        assert all(name.strip() for name in by_role[role]), role
    assert "layer4 11 findings, the worst: error" in by_role["DisclosureTriangle"]
    assert any(
        name.startswith("The gap between training and evaluation by layer") for name in by_role["image"]
    )


def test_thousands_of_layers_are_shown_at_once(page, tmp_path):
    layers = [
        Layer(f"block{number // 50}.{number}.bn", "BatchNorm2d(64)", 0.1, 0.02, 9, 0.1)
        for number in range(20_000)
    ]
    rows = [row("BN405", layer.path, "so", "do", gap=0.5) for layer in layers[:3_000]]
    (tmp_path / "page.html").write_text(render(Examined("m", rows, layers=layers)))
    page.show(tmp_path / "page.html", PHONE)
    assert page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd") < 5_000
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
