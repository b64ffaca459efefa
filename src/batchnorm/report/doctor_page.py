"""The page of an examination: `render(examined) -> str`, a self-contained HTML file without scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from batchnorm.records import Line, Panel
from batchnorm.report import bars, figures, tables
from batchnorm.report.bars import Bar, Words
from batchnorm.report.curve import thinned
from batchnorm.report.examined import SEVERITIES, THE_MODEL, Examined, Explained, Layer, Row, Severity, Shift
from batchnorm.report.layer_tree import Branch, layer_tree
from batchnorm.report.palette import DARK, LIGHT

_ENVIRONMENT = Environment(
    loader=PackageLoader("batchnorm.report", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# a path may break after each dot
_ENVIRONMENT.filters["path"] = lambda path: escape(path).replace(".", Markup(".<wbr>"))
# A page that a browser shows at once: the worst findings, and the layers that have some before others.
_FINDINGS, _LAYERS, _PANELS = 1_000, 2_000, 24
_OPEN_FINDINGS, _OPEN_LAYERS, _OPEN_PANELS, _CODES = 4, 30, 6, 4  # more of them are folded


@dataclass(frozen=True)
class Item:
    """A finding on the page.

    number: on the page, which its id ends with; 0 where it is left out.
    """

    number: int
    row: Row

    @property
    def place(self) -> str:
        return self.row["layer"] or THE_MODEL

    @property
    def evidence(self) -> list[tuple[str, str]]:
        """Names and values as text."""
        return [(name.replace("_", " "), _shown(value)) for name, value in self.row["evidence"].items()]


@dataclass(frozen=True)
class Group:
    """The findings of one check that are of one severity."""

    severity: Severity
    code: str
    about: Explained | None
    items: list[Item]

    @property
    def open(self) -> list[Item]:
        """Those that are seen at once: all, or the first of many."""
        return self.items if len(self.items) <= _OPEN_FINDINGS + 1 else self.items[:_OPEN_FINDINGS]

    @property
    def folded(self) -> list[Item]:
        return self.items[len(self.open) :]


@dataclass(frozen=True)
class Place:
    """A layer on the page.

    number: its row in the table, which its id ends with; 0 for a place that is none of the layers.
    """

    number: int
    layer: Layer
    items: list[Item]

    @cached_property
    def worst(self) -> Severity | None:
        """The worst severity of the findings there."""
        found = {item.row["severity"] for item in self.items}
        return next((each for each in SEVERITIES if each in found), None)

    @property
    def links(self) -> list[Item]:
        """The first finding of each check, as many as there is room for."""
        first = {item.row["code"]: item for item in reversed(self.items)}
        return list(islice((item for item in self.items if first[item.row["code"]] is item), _CODES))


@dataclass(frozen=True)
class Twig:
    """A branch of the tree of layers, with what was found in it.

    place: of the layer, where it is one.
    worst, number: of the findings in all of it.
    """

    name: str
    path: str
    place: Place | None
    below: list[Twig]
    worst: Severity | None
    number: int

    @property
    def open(self) -> bool:
        """Whether something serious is in it."""
        return self.worst in ("error", "warning")


@dataclass(frozen=True)
class Picture:
    """A figure of a layer."""

    title: str
    svg: Markup
    words: str


@dataclass(frozen=True)
class BarChart:
    """Bars by layer, for a phone and for a desk; `left_out` layers have none, for want of room."""

    narrow: Markup
    wide: Markup
    left_out: int


def render(examined: Examined) -> str:
    """The page of an examination as HTML; deterministic."""
    worst_first = examined.worst_first
    items = [Item(number if number <= _FINDINGS else 0, row) for number, row in enumerate(worst_first, 1)]
    places = _places(examined, items)
    tree = [_twig(branch, places) for branch in layer_tree(places)]
    shown = [place for place in places.values() if place.number]
    shifts = _drawn_shifts(examined.shift, places)
    page = _ENVIRONMENT.get_template("doctor_page.html.j2").render(
        examined=examined,
        light=Markup(LIGHT.css()),
        dark=Markup(DARK.css()),
        headline=_headline(examined),
        counts=_counts(examined),
        groups=_groups(examined, items[:_FINDINGS]),
        findings_left_out=max(len(items) - _FINDINGS, 0),
        tree=tree,
        open_all=len(places) <= _OPEN_LAYERS,
        places=shown,
        columns=_columns(shown),
        fold_layers=len(shown) > _OPEN_LAYERS,
        layers_left_out=len(examined.layers) - len(shown),
        gaps=_gaps(examined, places),
        drifts=_drifts(examined, places),
        shifts=[_picture(shift, f"s{number}") for number, shift in enumerate(shifts, 1)],
        open_shifts=_OPEN_PANELS,
        shifts_left_out=len(examined.shift) - len(shifts),
        fixed=_groups(examined, [Item(0, row) for row in examined.fixed[:_FINDINGS]]),
        fixed_left_out=max(len(examined.fixed) - _FINDINGS, 0),
        skipped=_skipped(examined),
        date=tables.format_time(examined.date),
        place_name=lambda path: path or THE_MODEL,
    )
    # a module's name may hold what UTF-8 does not
    return page.encode("utf-8", "replace").decode()


def _headline(examined: Examined) -> tuple[str, str]:
    """A number and what is said of it: of what is serious, or else of all that was found."""
    found = [row["severity"] for row in examined.findings]
    errors, warnings, infos = (found.count(each) for each in SEVERITIES)
    if errors and warnings:
        return f"{errors + warnings:,}", "errors and warnings"
    if errors or warnings:
        return f"{errors or warnings:,}", ("error" if errors else "warning") + "s" * (errors + warnings > 1)
    if infos:
        return f"{infos:,}", f"info{'s' * (infos > 1)}, and nothing serious"
    if examined.shift and not examined.fixed and not examined.skipped:
        steps = max((step for shift in examined.shift for step in shift.steps), default=0)
        return "", f"What came to {_many(len(examined.shift), 'layer')} in {_many(int(steps), 'step')}"
    return "", "Nothing is left to mend" if examined.fixed else "Nothing was found"


def _counts(examined: Examined) -> list[tuple[str, str]]:
    """Numbers and what they are of, without those that are 0."""
    found = [row["severity"] for row in examined.findings]
    plurals = {"error": "errors", "warning": "warnings", "info": "infos"}
    counts = [(found.count(each), each if found.count(each) == 1 else plurals[each]) for each in SEVERITIES]
    counts.append((len(examined.fixed), "fixed"))
    counts.append((len(examined.skipped), f"check{'s' * (len(examined.skipped) != 1)} not made"))
    counts.append((len(examined.layers), f"layer{'s' * (len(examined.layers) != 1)}"))
    return [(f"{number:,}", name) for number, name in counts if number]


def _groups(examined: Examined, items: Iterable[Item]) -> list[Group]:
    found: dict[tuple[Severity, str], list[Item]] = {}
    for item in items:
        found.setdefault((item.row["severity"], item.row["code"]), []).append(item)
    return [Group(*key, examined.checks.get(key[1]), of_one) for key, of_one in found.items()]


def _places(examined: Examined, items: Iterable[Item]) -> dict[str, Place]:
    """By path, in the order of the model: layers that are shown, and where else something was found."""
    by_path: dict[str, list[Item]] = {}
    for item in items:
        if item.number:
            by_path.setdefault(item.row["layer"], []).append(item)
    layers = {layer.path: layer for layer in examined.layers}
    room = _LAYERS - sum(path in layers for path in by_path)
    without = set(islice((path for path in layers if path not in by_path), max(room, 0)))
    kept = [path for path in layers if path in by_path or path in without]
    places = {path: Place(number, layers[path], by_path.get(path, [])) for number, path in enumerate(kept, 1)}
    return places | {
        path: Place(0, Layer(path, ""), found) for path, found in by_path.items() if path not in layers
    }


def _twig(branch: Branch, places: Mapping[str, Place]) -> Twig:
    below = [_twig(each, places) for each in branch.below]
    place = places[branch.path] if branch.is_layer else None
    found = {each.worst for each in below} | {place.worst if place else None}
    number = sum(each.number for each in below) + (len(place.items) if place else 0)
    worst = next((each for each in SEVERITIES if each in found), None)
    return Twig(branch.name or THE_MODEL, branch.path, place, below, worst, number)


def _columns(places: Sequence[Place]) -> list[tuple[str, list[str]]]:
    """What was measured of layers: heads of columns that are not empty, with a text for each layer."""
    columns = [
        ("gap", [tables.number(place.layer.gap) for place in places]),
        ("by chance", [tables.number(place.layer.by_chance) for place in places]),
        ("values", ["" if place.layer.values is None else f"{place.layer.values:,}" for place in places]),
        ("noise", [tables.number(place.layer.noise) for place in places]),
    ]
    return [(head, [cell or "—" for cell in cells]) for head, cells in columns if any(cells)]


def _gaps(examined: Examined, places: Mapping[str, Place]) -> BarChart | None:
    found = [
        Bar(layer.path or THE_MODEL, layer.gap, layer.by_chance, _is_serious(places.get(layer.path)))
        for layer in examined.layers
        if layer.gap is not None
    ]
    words = Words("standard deviations", "gap", "gap, with an error or a warning", "by chance")
    return _bar_chart(found, words, "The gap between training and evaluation by layer")


def _drifts(examined: Examined, places: Mapping[str, Place]) -> BarChart | None:
    found = [
        Bar(shift.layer or THE_MODEL, _mean(shift.drift), None, _is_serious(places.get(shift.layer)))
        for shift in examined.shift
    ]
    words = Words("standard deviations from look to look", "drift", "drift, with an error or a warning", "")
    return _bar_chart(found, words, "The drift of the mean by layer")


def _bar_chart(found: Sequence[Bar], words: Words, label: str) -> BarChart | None:
    drawn = bars.drawn(found)
    if not drawn:
        return None
    highest = max(drawn, key=lambda bar: bar.value)
    label += f", in {words.values}; the highest: {highest.path}, {tables.number(highest.value)}"
    narrow, wide = (Markup(bars.svg(drawn, size, words, label)) for size in (figures.NARROW, figures.WIDE))
    return BarChart(narrow, wide, len(found) - len(drawn))


def _is_serious(place: Place | None) -> bool:
    return place is not None and place.worst in ("error", "warning")


def _drawn_shifts(shifts: Sequence[Shift], places: Mapping[str, Place]) -> list[Shift]:
    """Those that are drawn: of many the layers with errors and warnings, then those that drift most."""

    def rank(at: int) -> tuple[bool, float, int]:
        drift = _mean(shifts[at].drift)
        return not _is_serious(places.get(shifts[at].layer)), -drift if math.isfinite(drift) else 0.0, at

    return [shifts[at] for at in sorted(sorted(range(len(shifts)), key=rank)[:_PANELS])]


def _picture(shift: Shift, prefix: str) -> Picture:
    place = shift.layer or THE_MODEL
    curves = (("85th", shift.p85, True), ("median", shift.p50, False), ("15th", shift.p15, True))
    lines = [
        thinned(Line(label=label, role="bn", x=list(shift.steps), y=list(values), dashed=dashed))
        for label, values, dashed in curves
    ]
    panel = Panel(title="", x_label="training steps", y_label="input", lines=lines)
    label = f"{place}: 15th, 50th and 85th percentile of its input against training steps"
    mean = _mean(shift.drift)
    words = (
        ""
        if math.isnan(mean)
        else f"Its mean moves {tables.number(mean)} standard deviations from look to look."
    )
    return Picture(place, Markup(figures.inline_svg(panel, prefix, figures.NARROW, label)), words)


def _mean(values: Sequence[float]) -> float:
    """Of the sizes of those that are known; nan of none."""
    known = [abs(value) for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _skipped(examined: Examined) -> list[tuple[list[tuple[str, str]], str]]:
    """Codes and names of checks that were not made for one reason, and the reason."""
    by_reason: dict[str, list[tuple[str, str]]] = {}
    for code, why in examined.skipped.items():
        by_reason.setdefault(why, []).append((code, examined.name(code)))
    return [(codes, why) for why, codes in by_reason.items()]


def _shown(value: float | int | str) -> str:
    if isinstance(value, float):
        return tables.number(value)
    return f"{value:,}".replace("-", "−") if isinstance(value, int) else str(value)


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
