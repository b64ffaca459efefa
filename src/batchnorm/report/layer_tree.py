"""Layers as a tree, nested as the modules of their model are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

_DEEPEST = 12  # levels; what is deeper keeps its dots


@dataclass
class Branch:
    """A module with layers in it, or a layer.

    name: below its parent; with dots where the modules between have nothing else in them.
    path: in the model.
    is_layer: whether it is itself one of the layers.
    """

    name: str
    path: str
    is_layer: bool = False
    below: list[Branch] = field(default_factory=list)


def layer_tree(paths: Iterable[str]) -> list[Branch]:
    """The modules at the top of a model that have layers in them, in their order; the path "" is the model itself."""
    top = Branch("", "")
    known: dict[str, Branch] = {"": top}
    for path in dict.fromkeys(paths):
        names = path.split(".") if path else []
        names[_DEEPEST - 1 :] = [".".join(names[_DEEPEST - 1 :])] if len(names) >= _DEEPEST else []
        branch = top
        for name in names:
            below = f"{branch.path}.{name}" if branch is not top else name
            if below not in known:
                known[below] = Branch(name, below)
                branch.below.append(known[below])
            branch = known[below]
        branch.is_layer = True
    itself = [Branch("", "", True)] if top.is_layer else []
    return itself + [_joined(each) for each in top.below]


def _joined(branch: Branch) -> Branch:
    """The branch without levels that hold a single module."""
    while len(branch.below) == 1 and not branch.is_layer:
        only = branch.below[0]
        branch = Branch(f"{branch.name}.{only.name}", only.path, only.is_layer, only.below)
    branch.below = [_joined(each) for each in branch.below]
    return branch
