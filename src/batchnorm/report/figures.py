"""Figures of chart records: PNG and SVG files, and inline SVG panels that take their colours from the page.

Deterministic: the same record gives the same bytes. pyplot is not used, as it keeps its figures in memory.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from batchnorm.records import Chart, Panel
from batchnorm.report.labels import Box, write
from batchnorm.report.palette import LIGHT, SENTINEL, follow_page
from batchnorm.report.panel import draw
from batchnorm.report.scale import share_y_range

# Width and height in points, 72 to the inch; the page shows a point as about one CSS pixel.
NARROW = (360.0, 300.0)  # a phone's width, and half the width of a page on a desk
WIDE = (640.0, 360.0)

_MARGIN = 16.0  # around and between the panels of a picture file
_TITLE = 32.0
_PANEL_TITLE = 24.0

_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the pictures are the same everywhere
    "svg.fonttype": "none",
    "svg.hashsalt": "batchnorm",
    "path.simplify": False,
}
_NO_METADATA = {"Date": None, "Creator": None}


def png(chart: Chart) -> bytes:
    """The chart as PNG on a white background, two pixels to a point."""
    with settings():
        figure = _draw_chart(chart)
        FigureCanvasAgg(figure)
        return _save(figure, "png", dpi=144, metadata={"Software": None})


def svg(chart: Chart) -> str:
    """The chart as an SVG file on a white background."""
    with settings():
        figure = _draw_chart(chart)
        FigureCanvasSVG(figure)
        return _save(figure, "svg", metadata=_NO_METADATA).decode()


def inline_svg(panel: Panel, prefix: str, size: tuple[float, float], label: str) -> str:
    """One panel as an <svg> element for an HTML page, without its title.

    prefix: of every id inside, so that ids are unique on the page.
    label: the aria-label.
    """
    with settings():
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        draw(figure, Box(0, 0, *size), panel, SENTINEL)
        document = _save(figure, "svg", metadata=_NO_METADATA).decode()
    head = f'<svg class="plot" viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" aria-label="{html.escape(label)}">'
    return head + _embed(document, prefix)


def _draw_chart(chart: Chart) -> Figure:
    """The figure of a chart: its title, and its panels side by side."""
    several = len(chart.panels) > 1
    width, height = NARROW if several else WIDE
    columns = max(len(chart.panels), 1)
    across = columns * (width + _MARGIN) + _MARGIN
    down = height + 2 * _MARGIN + _TITLE + (_PANEL_TITLE if several else 0)
    figure = Figure(figsize=(across / 72, down / 72), dpi=72, facecolor="white")
    write(figure, _MARGIN, down - _MARGIN - 12, chart.title, LIGHT.text, size=14, weight="bold")
    for column, panel in enumerate(share_y_range(chart.panels)):
        left = _MARGIN + column * (width + _MARGIN)
        if several:
            write(figure, left, _MARGIN + height + 9, panel.title, LIGHT.text, size=13)
        draw(figure, Box(left, _MARGIN, width, height), panel, LIGHT)
    return figure


@contextmanager
def settings() -> Iterator[None]:
    """A context with matplotlib's defaults and our settings, independent of the user's matplotlibrc."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # labels may be in any script; a missing glyph should not fail the report
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def _save(figure: Figure, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, **options)
    return file.getvalue()


def _embed(document: str, prefix: str) -> str:
    """The content of matplotlib's SVG document for embedding: the page's colours and font, and prefixed ids."""
    body = document[document.index("<svg") :]
    body = body[body.index(">") + 1 :]
    # the <style> would apply to the whole page
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    used = dict.fromkeys(re.findall(r'<[^>]*(?:url\(|href=")#([^)"]+)', body))
    names = {name: f"{prefix}-{number}" for number, name in enumerate(used, start=1)}

    def tag(match: re.Match[str]) -> str:
        text = re.sub(r' id="([^"]*)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", match[0])
        text = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{names[m[1]]})", text)
        text = re.sub(r'xlink:href="#([^"]+)"', lambda m: f'href="#{names[m[1]]}"', text)
        text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
        text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
        return follow_page(" ".join(text.split()))

    # inside tags only, so that text which looks like an attribute is kept
    body = re.sub(r"<[^>]*>", tag, body)
    return re.sub(r">\s+<", ">\n<", body).strip()
