"""Groups of commands whose module is imported only when one of them runs or is listed, so that `--help` is fast."""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup


def lazy_app(module: str, **settings: Any) -> typer.Typer:
    """An app with the commands of the `app` in `module`.

    settings: arguments of `typer.Typer`.
    """

    class LazyGroup(TyperGroup):
        @cached_property
        def _loaded(self) -> TyperGroup:
            return typer.main.get_group(import_module(module).app)

        def list_commands(self, ctx: Any) -> list[str]:
            return self._loaded.list_commands(ctx)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            return self._loaded.get_command(ctx, cmd_name)

    return typer.Typer(cls=LazyGroup, **settings)
