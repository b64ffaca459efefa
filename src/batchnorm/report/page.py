"""The page of a run: `render(records) -> str`, a self-contained HTML file without scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchnorm.records import Chart, Panel, Record
from batchnorm.report import contents as report_contents
from batchnorm.report import course, figures, tables
from batchnorm.report.contents import Contents
from batchnorm.report.palette import DARK, LIGHT
from batchnorm.report.scale import share_y_range

_ENVIRONMENT = Environment(
    loader=PackageLoader("batchnorm.report", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# no line break between a number and its "%" or its spread
_ENVIRONMENT.filters["prose"] = lambda text: text.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")
Progress = Callable[[Sequence[Chart]], Iterable[Chart]]
_MANY = 30  # a longer table of networks or classes is folded initially


@dataclass(frozen=True)
class Picture:
    """A panel of a chart: narrow, and also wide if it is the only one of its chart."""

    title: str
    narrow: Markup
    wide: Markup | None


@dataclass(frozen=True)
class Figure:
    """A chart with its panels as SVG."""

    title: str
    caption: str
    pictures: list[Picture]


def shown(contents: Contents) -> list[Chart]:
    """The charts of a run: those in its records, and that of a training's course."""
    whole = None if contents.judged else course.course(contents)
    return [*contents.charts, *([whole] if whole is not None else [])]


def render(records: Iterable[Record], progress: Progress = list) -> str:
    """The page of a run as HTML; deterministic.

    progress: goes through the charts, which take a while to draw, and may show how many are done.

    Raises: RecordError when the run record is missing.
    """
    contents = report_contents.gather(records)
    drawn = shown(contents)
    charts = {chart.name: _figure(chart, f"f{number}") for number, chart in enumerate(progress(drawn), 1)}
    claimed = {verdict.claim for verdict in contents.verdicts}
    so_far = report_contents.progress(contents) if contents.judged and not contents.verdicts else None
    networks = tables.networks(contents)
    classes = None if contents.judged else course.classes(contents)
    return _ENVIRONMENT.get_template("page.html.j2").render(
        run=contents.run,
        commands=contents.commands,
        light=Markup(LIGHT.css()),
        dark=Markup(DARK.css()),
        started=tables.format_time(contents.run.started),
        headline=(report_contents if contents.judged else course).headline(contents),
        judged=contents.judged,
        finished=contents.finished,
        resume=contents.resume,
        verdicts=contents.verdicts,
        figures_of=lambda claim: [charts[chart.name] for chart in drawn if chart.claim == claim],
        tables_of=tables.of_verdict,
        unjudged=[charts[chart.name] for chart in drawn if chart.claim not in claimed],
        progress=_figure(so_far, "f0") if so_far else None,
        classes=classes,
        fold_classes=classes is not None and len(classes.rows) > _MANY,
        confusion=None if contents.judged else course.confusion(contents),
        unreadable=_unreadable(contents),
        networks=networks,
        fold_networks=networks is not None and len(networks.rows) > _MANY,
        configurations=tables.configurations(contents),
        config=json.dumps(contents.run.config, indent=2, ensure_ascii=False),
    )


def _unreadable(contents: Contents) -> str:
    """How many images a training could not read, and the first of them; empty if it read all."""
    results = [network.result for network in contents.networks if network.result is not None]
    number = sum(result.unreadable for result in results)
    names = [name for result in results for name in result.unreadable_images]
    if not number:
        return ""
    listed = ", ".join(names) + (", …" if len(names) < number else "")
    return f"{number:,} image{'s' * (number != 1)}" + (f": {listed}" if names else "")


def _figure(chart: Chart, prefix: str) -> Figure:
    alone = len(chart.panels) == 1
    pictures = []
    for number, panel in enumerate(share_y_range(chart.panels), 1):
        label = _aria_label(chart, panel)
        narrow = figures.inline_svg(panel, f"{prefix}-{number}", figures.NARROW, label)
        wide = figures.inline_svg(panel, f"{prefix}-{number}w", figures.WIDE, label) if alone else None
        pictures.append(Picture(panel.title, Markup(narrow), Markup(wide) if wide else None))
    return Figure(chart.title, chart.caption, pictures)


def _aria_label(chart: Chart, panel: Panel) -> str:
    """The description of a panel for screen readers."""
    names = ", ".join(line.label for line in panel.lines if line.label)
    title = f"{chart.title}, {panel.title}" if panel.title else chart.title
    return f"{title}: {panel.y_label} against {panel.x_label}" + (f"; lines: {names}" if names else "")
