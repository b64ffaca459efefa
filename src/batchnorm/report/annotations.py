"""Findings as annotations of GitHub: workflow commands, which a job prints.

`::warning title=BN201 momentum::layer1.0.bn1: momentum is 0.99. bn.configure(...)`
"""

from __future__ import annotations

from batchnorm.report.examined import THE_MODEL, Examined, Row, sentence

_LEVELS = {"error": "error", "warning": "warning", "info": "notice"}


def github(examined: Examined, file: str = "") -> str:
    """A line for each finding, the worst first: GitHub shows the first ten of a level in a step.

    file: of the repository, to whose first line they are tied.
    """
    return "".join(f"{_command(examined, row, file)}\n" for row in examined.worst_first)


def _command(examined: Examined, row: Row, file: str) -> str:
    properties = {"file": file, "line": "1"} if file else {}
    properties["title"] = f"{row['code']} {examined.name(row['code'])}".rstrip()
    written = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    said = _data(f"{row['layer'] or THE_MODEL}: {sentence(row)}")
    return f"::{_LEVELS[row['severity']]} {written}::{said}"


def _data(text: str) -> str:
    # "%" first, or the escapes of the others would be escaped; what UTF-8 cannot hold, no terminal takes
    text = text.encode("utf-8", "replace").decode()
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
