"""Options whose help, default and minimum come from the fields of a pydantic model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel


def model_option(model: type[BaseModel], field: str, *declarations: str, **overrides: Any) -> Any:
    """The `typer.Option` for a field of `model`, for use in Annotated.

    The help shows the default of the model, so that the option itself may default to None, "not given".

    declarations, overrides: arguments of `typer.Option`.
    """
    info = model.model_fields[field]
    options: dict[str, Any] = {
        "help": _sentence(info.description or ""),
        "min": next(
            (limit for each in info.metadata if (limit := getattr(each, "ge", None)) is not None), None
        ),
        "show_default": True if isinstance(info.default, bool) else as_typed(info.default),
    }
    return typer.Option(*declarations, **options | overrides)


def as_typed(value: Any) -> str:
    """`value` as it is typed on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""
