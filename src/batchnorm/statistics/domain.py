"""Which of its named sets of running statistics a layer uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_active: str | None = None


@contextmanager
def domain(name: str | None) -> Iterator[None]:
    """Let every layer use, and in training move, the running statistics called `name`; γ and β are shared by all.

    For data of several kinds that one network sees: the real and the generated images of a GAN, clean and adversarial
    images, source and target. A set is made, as new, by the first training batch that comes to it; its buffers are
    `domains.<name>.running_mean` and so on in the state_dict. Outside of every `domain`, and in that of None, a
    layer uses its own.

    Process-wide; contexts nest.

    Raises: ValueError for a name with a dot in it, which cannot be part of a key of a state_dict; RuntimeError from
        a layer that is evaluated in a domain it has never seen.
    """
    global _active
    if name is not None and (not name or "." in name):
        raise ValueError(
            f"a domain's name is part of a state_dict's keys: not empty and without a dot, got {name!r}"
        )
    before, _active = _active, name
    try:
        yield
    finally:
        _active = before


def active() -> str | None:
    """The domain that layers are in."""
    return _active
