"""The page of a run: `render(records) -> str`, one HTML file that needs nothing else and has no script."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchnorm.records import Chart, Panel, Record
from batchnorm.report import contents as gathered
from batchnorm.report import figures, tables
from batchnorm.report.ink import DARK, LIGHT
from batchnorm.report.scale import on_one_scale

_ENVIRONMENT = Environment(
    loader=PackageLoader("batchnorm.report", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# a number stays on one line with its "%" and with its spread
_ENVIRONMENT.filters["prose"] = lambda text: text.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")
_MANY = 30  # a longer table of networks starts folded


@dataclass(frozen=True)
class Picture:
    """A panel of a chart: for a phone or half a page, and, when it stands alone, for a whole page."""

    title: str
    narrow: Markup
    wide: Markup | None


@dataclass(frozen=True)
class Figure:
    """A chart with its panels drawn."""

    title: str
    caption: str
    pictures: list[Picture]


def render(records: Iterable[Record]) -> str:
    """The page of a run as HTML; the same records give the same text.

    Raises: RecordError when no record says what run this is.
    """
    contents = gathered.gather(records)
    charts = {chart.name: _figure(chart, f"f{number}") for number, chart in enumerate(contents.charts, 1)}
    claimed = {verdict.claim for verdict in contents.verdicts}
    progress = None if contents.verdicts else gathered.progress(contents)
    networks = tables.networks(contents)
    return _ENVIRONMENT.get_template("page.html.j2").render(
        run=contents.run,
        light=Markup(LIGHT.css()),
        dark=Markup(DARK.css()),
        started=tables.format_time(contents.run.started),
        headline=gathered.headline(contents),
        judged=contents.judged,
        finished=contents.finished,
        resume=contents.resume,
        verdicts=contents.verdicts,
        figures_of=lambda claim: [charts[chart.name] for chart in contents.charts if chart.claim == claim],
        tables_of=tables.of_verdict,
        unjudged=[charts[chart.name] for chart in contents.charts if chart.claim not in claimed],
        progress=_figure(progress, "f0") if progress else None,
        networks=networks,
        fold_networks=networks is not None and len(networks.rows) > _MANY,
        configurations=tables.configurations(contents),
        config=json.dumps(contents.run.config, indent=2, ensure_ascii=False),
    )


def _figure(chart: Chart, prefix: str) -> Figure:
    alone = len(chart.panels) == 1
    pictures = []
    for number, panel in enumerate(on_one_scale(chart.panels), 1):
        label = _spoken(chart, panel)
        narrow = figures.inline_svg(panel, f"{prefix}-{number}", figures.NARROW, label)
        wide = figures.inline_svg(panel, f"{prefix}-{number}w", figures.WIDE, label) if alone else None
        pictures.append(Picture(panel.title, Markup(narrow), Markup(wide) if wide else None))
    return Figure(chart.title, chart.caption, pictures)


def _spoken(chart: Chart, panel: Panel) -> str:
    """What a screen reader says in place of a panel."""
    names = ", ".join(line.label for line in panel.lines if line.label)
    title = f"{chart.title}, {panel.title}" if panel.title else chart.title
    return f"{title}: {panel.y_label} against {panel.x_label}" + (f"; lines: {names}" if names else "")
