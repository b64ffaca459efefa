"""What the package and its optional parts need, and the command that installs it; does not import torch."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version


def install_command(extra: str) -> str:
    """The command that installs what the extra "cli" or "train" needs, or "" for torch alone, from any index.

    It names the packages: batchnorm itself may come from a folder, and `pip install 'batchnorm[train]'` from nowhere.
    """
    return f"pip install {' '.join(map(_quoted, _packages(extra)))}"


@cache
def old_torch() -> str:
    """Why the installed torch is too old, and the command that mends it, in one line; empty if it is not.

    Asked before torch is imported, as an old one may fail at any of its names.
    """
    try:
        found, wanted = version("torch"), _packages("")
    except PackageNotFoundError:  # absent, or built from source
        return ""
    least = next((each.partition(">=")[2] for each in wanted if each.startswith("torch>=")), "0")
    if _numbers(found) >= _numbers(least):
        return ""
    return f"torch {found} is installed, and this needs torch {least} or newer: {install_command('')}"


def _numbers(release: str) -> list[int]:
    """[2, 10, 0] of "2.10.0a0+git"."""
    return [int(part) for part in re.findall(r"\d+", release.split("+")[0].split("a")[0])]


def _packages(extra: str) -> list[str]:
    """What the extra needs; for "" what the package always needs."""
    try:
        lines = requires("batchnorm") or []
    except PackageNotFoundError:  # the source alone, on the path
        lines = []
    found = []
    for line in lines:
        package, _, marker = line.partition(";")
        if not re.search(rf"extra == ['\"]{extra}['\"]" if extra else "^$", marker):
            continue
        package = package.strip()
        nested = re.fullmatch(r"batchnorm\[([\w,]+)\]", package)
        found += [each for name in nested[1].split(",") for each in _packages(name)] if nested else [package]
    return found or [f"batchnorm[{extra}]" if extra else "torch"]


def _quoted(package: str) -> str:
    return f"'{package}'" if re.search(r"[<>\[]", package) else package
