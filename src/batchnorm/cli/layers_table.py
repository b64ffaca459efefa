"""A pass's report as a table: which layer, what became of it, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.cli.terminal import show

if TYPE_CHECKING:
    from rich.console import Console

    from batchnorm.passes.report import Report

_STYLES = {"left alone": "red", "affine": "yellow", "removed": "yellow", "weakened": "yellow"}


def show_layers(console: Console, report: Report, column: str) -> None:
    """A row for each layer, `column` for what and why, and the summary below."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "outcome", column):
        table.add_column(name, overflow="fold")
    for layer in report.layers:
        text = "; ".join(filter(None, (layer.what.removeprefix("into "), layer.why)))
        style = _STYLES.get(layer.outcome, "green")
        table.add_row(layer.name or "(the model)", f"[{style}]{layer.outcome}[/]", escape(text))
    if report.layers:
        console.print(table)
    show(console, report.summary)


def warn_of_random_weights(console: Console, has_weights: bool) -> None:
    """Say so where what was done was done to a network that has learnt nothing."""
    if not has_weights:
        show(console, "The weights are random: give those of a trained network, --weights FILE.", "yellow")
