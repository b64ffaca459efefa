"""Findings as SARIF 2.1.0, the format in which tools of static analysis give theirs to others."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from batchnorm.report.examined import Examined, Row, sentence

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def sarif(examined: Examined, version: str, file: str = "") -> dict[str, Any]:
    """A log of one run: a rule for each check, a result for each finding, a notification for each check not made.

    A result is at a layer, which is a logical location. GitHub shows those only that are in a file too.

    version: of batchnorm.
    file: of the repository, to whose first line they are tied.
    """
    findings = examined.worst_first
    codes = sorted({*examined.checks, *(row["code"] for row in findings)})
    again = Counter[str]()
    results = []
    for row in findings:
        place = f"{row['code']} {row['layer']}"
        again[place] += 1
        results.append(
            _result(examined, row, codes.index(row["code"]), f"{_hash(place)}:{again[place]}", file)
        )
    invocation: dict[str, Any] = {
        "executionSuccessful": True,
        "toolConfigurationNotifications": [
            {"level": "note", "message": {"text": f"not made: {why}"}, "associatedRule": {"id": code}}
            for code, why in examined.skipped.items()
        ],
    }
    if examined.command:
        invocation["commandLine"] = examined.command
    driver = {"name": "batchnorm", "version": version, "rules": [_rule(examined, code) for code in codes]}
    run = {"tool": {"driver": driver}, "invocations": [invocation], "results": results}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(examined: Examined, code: str) -> dict[str, Any]:
    about = examined.checks.get(code)
    if about is None:
        return {"id": code}
    return {
        "id": code,
        "name": about.name,
        "shortDescription": {"text": about.symptom},
        "fullDescription": {"text": about.why},
        "help": {"text": f"{about.why} Known from: {about.source}"},
        "defaultConfiguration": {"level": _LEVELS[about.severity]},
    }


def _result(examined: Examined, row: Row, rule: int, fingerprint: str, file: str) -> dict[str, Any]:
    layer = row["layer"]
    logical = {
        "name": layer.rpartition(".")[2] or examined.title,
        "fullyQualifiedName": layer or examined.title,
        "kind": "member" if layer else "module",
    }
    location: dict[str, Any] = {"logicalLocations": [logical]}
    if file:
        location["physicalLocation"] = {
            "artifactLocation": {"uri": _uri(file)},
            "region": {"startLine": 1},
        }
    return {
        "ruleId": row["code"],
        "ruleIndex": rule,
        "level": _LEVELS[row["severity"]],
        "message": {"text": sentence(row)},
        "locations": [location],
        # by the layer: all are on one line of a file, which is what others would tell them apart by
        "partialFingerprints": {"primaryLocationLineHash": fingerprint},
        "properties": {"evidence": {name: _json(value) for name, value in row["evidence"].items()}},
    }


def _uri(file: str) -> str:
    path = PurePath(file)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _json(value: float | int | str) -> float | int | str:
    """JSON has no inf and no nan."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
