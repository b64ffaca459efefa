"""The options of the commands that use a trained network: which one, and how."""

from __future__ import annotations

from typing import Annotated

import typer

CropsOption = Annotated[int, typer.Option(metavar="1|144", help="Crops of an image.")]
StatisticsOption = Annotated[
    str,
    typer.Option(
        metavar="population|moving|average",
        help="Statistics of BN: population (Algorithm 2) or moving (averages); average: averaged weights.",
    ),
]
FinalOption = Annotated[bool, typer.Option("--final", help="From a run's folder take final.pt, not best.pt.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads on a CPU.", show_default="torch's")]
