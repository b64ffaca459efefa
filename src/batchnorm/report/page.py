"""The page of a run: `render(records) -> str`, a self-contained HTML file without scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchnorm.records import Chart, Panel, Record
from batchnorm.report import contents as report_contents
from batchnorm.report import figures, tables
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
_MANY = 30  # a longer table of networks is folded initially


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


def render(records: Iterable[Record]) -> str:
    """The page of a run as HTML; deterministic.

    Raises: RecordError when the run record is missing.
    """
    contents = report_contents.gather(records)
    charts = {chart.name: _figure(chart, f"f{number}") for number, chart in enumerate(contents.charts, 1)}
    claimed = {verdict.claim for verdict in contents.verdicts}
    progress = None if contents.verdicts else report_contents.progress(contents)
    networks = tables.networks(contents)
    return _ENVIRONMENT.get_template("page.html.j2").render(
        run=contents.run,
        light=Markup(LIGHT.css()),
        dark=Markup(DARK.css()),
        started=tables.format_time(contents.run.started),
        headline=report_contents.headline(contents),
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
