"""A run.toml and the changes of `--set`, as a `Config`; errors name the keys as they stand in the file."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from batchnorm.training.config import INCEPTION, Config, InceptionModel, LibraryModel

_LARGEST = 2**20  # bytes of a run.toml
_LONGEST = 200  # characters of a value in a message
_IN_TOML = {"a valid boolean": "true or false", "a valid array": "a list", "tuple": "list"}


class ConfigError(Exception):
    """A configuration that cannot be used; the message names the key and suggests the nearest known one."""


def read(path: Path, changes: Iterable[str] = ()) -> Config:
    """The configuration in the file at `path` with `changes`, each "section.key=value" with a value as in TOML.

    Without a value, "section.key=", a key of the file is left out.

    Raises: ConfigError.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}") from None
    if len(content) > _LARGEST:
        raise ConfigError(f"{path} is no run.toml: it has more than {_LARGEST:,} bytes")
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path} is not TOML that can be read: it is nested too deep") from None
    except ValueError as error:  # beyond TOML's own: an integer of 5,000 digits
        raise ConfigError(f"{path} is not TOML: {str(error).split(';')[0]}") from None
    return parse(values, changes)


def parse(values: Mapping[str, Any], changes: Iterable[str] = ()) -> Config:
    """The configuration of these nested `values` with `changes`, as in `read`. Raises: ConfigError."""
    merged: dict[str, dict[str, Any]] = {"training": {}} | {
        name: _section(name, part) for name, part in values.items()
    }
    for change in changes:
        _change(merged, change)
    try:
        # validated as JSON, whose strict mode has TOML's types: a list may become a tuple, but a string is no number
        # and a number is no boolean
        return Config.model_validate_json(json.dumps(merged, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError("; ".join(format_error(each) for each in error.errors())) from None


def differences(one: Config, other: Config) -> list[str]:
    """The keys, section.key, in which two configurations would train differently."""
    before, after = one.identity(), other.identity()
    return [
        f"{section}.{name}"
        for section, values in before.items()
        for name in {**values, **after[section]}
        if values.get(name) != after[section].get(name)
    ]


def to_toml(config: Config) -> str:
    """The text of a run.toml with every key of `config`, but for those that are None, which TOML cannot hold."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def literal(value: Any) -> str:
    """`value` as it stands in a run.toml, a long one shortened."""
    text = str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 4 :]}"


def _section(name: str, values: Any) -> dict[str, Any]:
    if isinstance(values, Mapping):
        return dict(values)
    if name in Config.model_fields:
        raise ConfigError(f"{name} is a section: write [{name}], and its keys below")
    homes = [section for section in Config.model_fields if name in _keys(section)]
    where = f": write it below [{homes[0]}]" if homes else f", and no section has a key {name}"
    raise ConfigError(f"{name} = {literal(values)} stands in no section{where}")


def _change(values: dict[str, dict[str, Any]], change: str) -> None:
    key, equals, text = change.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or len(parts) != 2 or not all(parts):
        raise ConfigError(f"--set takes section.key=value, as in optimizer.rate=0.1, not {change!r}")
    section, name = parts
    if not text.strip() and (name in values.get(section, {}) or _is_optional(section, name)):
        values.get(section, {}).pop(name, None)
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()  # a string needs no quotes on a command line
    values.setdefault(section, {})[name] = value


def format_error(error: ErrorDetails) -> str:
    """One error of pydantic in the words of run.toml: the key, the value and the reason."""
    section, *rest = error["loc"] or ("",)  # no location: a value that JSON cannot hold
    library = section == "model" and rest[:1] == ["library"]
    if section == "model":
        rest = rest[1:]  # the first is the tag of the union
    where = str(section) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
    if error["type"] == "extra_forbidden":
        known = _keys(str(section), library) if rest else Config.model_fields
        of = " of a model of torchvision or timm" if library else ""
        if library and rest[-1] in _keys("model"):
            return f"unknown key {where}{of}: it is {INCEPTION}'s; there are {', '.join(known)}"
        return f"unknown key {where}{of}{_suggest(str(rest[-1] if rest else section), known)}"
    if error["type"] == "missing":
        return f"{where} is missing"
    why = (error["msg"][0].lower() + error["msg"][1:]).removeprefix("value error, ")
    for pydantic_word, toml_word in _IN_TOML.items():
        why = why.replace(pydantic_word, toml_word)
    if len(rest) == 1 and (bounds := _bounds(str(section), str(rest[0]), library)):
        why = f"{why}; it is {bounds}"
    return f"{where} = {literal(error['input'])}: {why}" if where else why


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else f": there are {', '.join(known)}"


def _keys(section: str, library: bool = False) -> dict[str, FieldInfo]:
    """The keys that a section has."""
    if section == "model":
        return (LibraryModel if library else InceptionModel).model_fields
    kind = Config.model_fields[section].annotation
    assert isinstance(kind, type) and issubclass(kind, BaseModel)
    return kind.model_fields


def _is_optional(section: str, name: str) -> bool:
    """Whether a key may be absent without a default that stands for it."""
    field = _keys(section).get(name) if section in Config.model_fields else None
    return field is not None and field.default is None


def _bounds(section: str, name: str, library: bool) -> str:
    """The range of a number, e.g. "above 0 and at most 16"; empty for other keys."""
    field = _keys(section, library).get(name) if section in Config.model_fields else None
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    limits = [
        f"{word} {_number(getattr(limit, kind))}"
        for limit in (field.metadata if field else ())
        for kind, word in words.items()
        if hasattr(limit, kind)
    ]
    return " and ".join(limits)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
