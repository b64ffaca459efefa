"""What the optional parts of the package need, and the command that installs it; no torch."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires


def install_command(extra: str) -> str:
    """The command that installs what the extra "cli" or "train" needs, from any index.

    It names the packages: batchnorm itself may come from a folder, and `pip install 'batchnorm[train]'` from nowhere.
    """
    return f"pip install {' '.join(map(_quoted, _packages(extra)))}"


def _packages(extra: str) -> list[str]:
    try:
        lines = requires("batchnorm") or []
    except PackageNotFoundError:  # the source alone, on the path
        lines = []
    found = []
    for line in lines:
        package, _, marker = line.partition(";")
        if not re.search(rf"extra == ['\"]{extra}['\"]", marker):
            continue
        package = package.strip()
        nested = re.fullmatch(r"batchnorm\[([\w,]+)\]", package)
        found += [each for name in nested[1].split(",") for each in _packages(name)] if nested else [package]
    return found or [f"batchnorm[{extra}]"]


def _quoted(package: str) -> str:
    return f"'{package}'" if re.search(r"[<>\[]", package) else package
