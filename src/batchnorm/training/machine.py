"""The machine and the package versions of a run, for its record."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

from batchnorm.training.workers import available_cores


def versions() -> dict[str, str]:
    """The versions of Python, batchnorm and torch."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("batchnorm", "torch")}


def machine() -> str:
    """The processor, the cores this process may use and the system, in one line."""
    return f"{_processor()}, {available_cores()} cores, {platform.system()} {platform.machine()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "processor"
    )
