"""`where=`: which places a user wants."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable

from torch import nn

from batchnorm.graph.nonlinearity import Place

Where = str | type[nn.Module] | Iterable[str | type[nn.Module]] | Callable[..., bool] | None


class Choice:
    """Which places `where` takes."""

    def __init__(
        self,
        names: tuple[str, ...],
        kinds: tuple[type, ...],
        predicate: Callable[[str, nn.Module], bool] | None,
    ) -> None:
        self.names, self.kinds, self.predicate = names, kinds, predicate

    @classmethod
    def of(cls, where: Where) -> Choice:
        if where is None:
            return cls((), (), lambda name, module: True)
        if isinstance(where, (str, type)):
            where = [where]
        if not isinstance(where, Iterable):
            if not callable(where):
                raise ValueError(
                    f"where takes names, classes or a function of name and module, got {where!r}"
                )
            return cls((), (), _of_name_and_module(where))
        names, kinds = [], []
        for each in where:
            if isinstance(each, str):
                names.append(each)
            elif isinstance(each, type):
                kinds.append(each)
            else:
                raise ValueError(f"where takes names, classes or a function of name and module, got {each!r}")
        return cls(tuple(names), tuple(kinds), None)

    def takes(self, path: str, module: nn.Module) -> bool:
        if self.predicate is not None:
            return bool(self.predicate(path, module))
        return isinstance(module, self.kinds) or any(self._matches(name, path) for name in self.names)

    def names_in_full(self, path: str | None) -> bool:
        return path in self.names

    @staticmethod
    def _matches(name: str, path: str) -> bool:
        return path == name or path.startswith(f"{name}.") or fnmatch.fnmatchcase(path, name) or not name

    def check(self, taken: dict[str, Place], found: dict[str, Place], why: dict[str, str]) -> None:
        """Raise ValueError for a name of nothing, or of what cannot have a layer."""
        for name in self.names:
            if not any(self._matches(name, path) for path in (*found, *_followers(found))):
                raise ValueError(
                    f"where={name!r} is no module with a linear operation that was called; these are: "
                    f"{', '.join(found) or 'none'}"
                )
            of_name = [path for path, place in found.items() if name in (path, place.nonlinearity)]
            if of_name and not any(self._matches(name, path) for path in (*taken, *_followers(taken))):
                raise ValueError(f"{of_name[0]} cannot have a layer: it {why[of_name[0]]}")
        if self.kinds and not taken and not self.names:
            kinds = ", ".join(kind.__name__ for kind in self.kinds)
            raise ValueError(f"where={kinds} takes none of: {', '.join(found) or 'none'}")


def _followers(places: dict[str, Place]) -> list[str]:
    return [place.nonlinearity for place in places.values() if place.nonlinearity is not None]


def _of_name_and_module(predicate: Callable[..., bool]) -> Callable[[str, nn.Module], bool]:
    try:
        arguments = inspect.signature(predicate).parameters.values()
    except (TypeError, ValueError):  # of something in C
        return predicate
    if sum(each.default is each.empty for each in arguments) == 1:
        return lambda name, module: predicate(module)
    return predicate
