"""Which of its named sets of running statistics a layer uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_active: str | None = None
_ANY = nn.ModuleDict()  # such a one holds a layer's sets, by attributes of their names


@contextmanager
def domain(name: str | None) -> Iterator[None]:
    """Let every layer use, and in training move, the running statistics called `name`; γ and β are shared by all.

    For data of several kinds that one network sees: the real and the generated images of a GAN, clean and adversarial
    images, source and target. A set is made, as new, by the first training batch that comes to it; its buffers are
    `domains.<name>.running_mean` and so on in the state_dict. Outside of every `domain`, and in that of None, a
    layer uses its own.

    Process-wide; contexts nest.

    Raises: ValueError for a name with a dot in it, which cannot be part of a key of a state_dict, and for one that
        modules have for something else, "train" say; RuntimeError from a layer that is evaluated in a domain it has
        never seen.
    """
    global _active
    if name is not None and (not name or "." in name):
        raise ValueError(
            f"a domain's name is part of a state_dict's keys: not empty and without a dot, got {name!r}"
        )
    if name is not None and hasattr(_ANY, name):
        raise ValueError(
            f"{name!r} is no name for a domain: it is a module's attribute already; {name}_set, say, is none"
        )
    before, _active = _active, name
    try:
        yield
    finally:
        _active = before


def active() -> str | None:
    """The domain that layers are in."""
    return _active
