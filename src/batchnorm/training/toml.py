"""A run.toml and what `--set` changes in it, as a `Config`; what is wrong is said in the file's own words."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from batchnorm.training.config import ELSEWHERE, Config, InceptionModel, TorchvisionModel


class ConfigError(Exception):
    """A configuration that cannot be used; the message names the key and, where it can, the one that was meant."""


def read(path: Path, changes: Iterable[str] = ()) -> Config:
    """The configuration in the file at `path` with `changes`, each "section.key=value" with a value as in TOML.

    Raises: ConfigError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    return parse(values, changes)


def parse(values: Mapping[str, Any], changes: Iterable[str] = ()) -> Config:
    """The configuration of these nested `values` with `changes`, as in `read`. Raises: ConfigError."""
    merged = {name: dict(part) if isinstance(part, Mapping) else part for name, part in values.items()}
    for change in changes:
        _change(merged, change)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("; ".join(_said(each) for each in error.errors())) from None


def differences(one: Config, other: Config) -> list[str]:
    """The keys, section.key, in which two configurations would train differently."""
    mine, theirs = (each.model_dump(exclude=ELSEWHERE) for each in (one, other))
    return [
        f"{section}.{name}"
        for section, values in mine.items()
        for name in {**values, **theirs[section]}
        if values.get(name) != theirs[section].get(name)
    ]


def _change(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise ConfigError(f"--set takes section.key=value, as in optimizer.rate=0.1, not {change!r}")
    section, name = parts
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a string needs no quotes on a command line
    if not isinstance(values.setdefault(section, {}), dict):
        raise ConfigError(f"--set {change}: {section} is no section")
    values[section][name] = value


def _said(error: Any) -> str:
    # of a model, the union's tag is part of the place
    place = [str(part) for part in error["loc"] if part not in ("inception", "torchvision")]
    where = ".".join(place)
    if error["type"] == "extra_forbidden":
        known = _keys(place[:-1], error["loc"])
        return f"unknown key {where}{_meant(place[-1], known)}"
    if error["type"] == "missing":
        return f"{where} is missing"
    return f"{where} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _meant(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else f": there are {', '.join(known)}"


def _keys(section: list[str], location: tuple[Any, ...]) -> Iterable[str]:
    """The keys that a section has, or the sections that there are."""
    if not section:
        return Config.model_fields
    if section[0] == "model":
        return (TorchvisionModel if "torchvision" in location else InceptionModel).model_fields
    kind = Config.model_fields[section[0]].annotation
    assert isinstance(kind, type) and issubclass(kind, BaseModel)
    return kind.model_fields
