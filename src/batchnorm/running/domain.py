"""Which of its named sets of running statistics a layer uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_active: str | None = None
_ANY = nn.ModuleDict()  # such a one holds a layer's sets, by attributes of their names


@contextmanager
def domain(name: str | None) -> Iterator[None]:
    """Let every layer use, and in training update, the running statistics called `name`; γ and β are shared by all.

    For data of several kinds that one network sees: the real and the generated images of a GAN, clean and adversarial
    images, source and target. A set is made, as new, by the first training batch that comes to it; its buffers are
    `domains.<name>.running_mean` and so on in the state_dict. Outside of every `domain`, and in that of None, a
    layer uses its own.

    Process-wide; contexts nest. Separate statistics for each domain are AdaBN's (Li et al. 2016); here they are named
    and kept.

    Args:
        name: of the set, a part of the state_dict's keys; None: each layer's own statistics.

    Yields: None.

    Raises:
        ValueError: the name is empty or has a dot in it, so that it cannot be part of a state_dict's key, or modules
            have it for something else, "train" say.
        RuntimeError: from a layer that is evaluated in a domain it has never seen.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm1d(8)
        >>> with bn.domain("night"):
        ...     y = layer(torch.randn(16, 8) + 5)
        >>> int(layer.num_batches_tracked), "domains.night.running_mean" in layer.state_dict()
        (0, True)
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
