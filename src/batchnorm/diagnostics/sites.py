"""The layers whose inputs are looked at, and where these have their channels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from batchnorm.diagnostics.layer import is_batch_norm

_CHANNELS_FIRST: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.modules.conv._ConvNd,
    nn.GroupNorm,
)
_CHANNELS_LAST: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
_SOFTMAX = (nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax)


@dataclass(frozen=True)
class Site:
    """A layer whose input is looked at.

    path: of the layer.
    module: itself.
    dim: of its input's channels; None: each number of an example is one.
    """

    path: str
    module: nn.Module
    dim: int | None


def sites(model: nn.Module, patterns: str | Iterable[str] | None, channels: int | None) -> list[Site]:
    """The layers that are meant, in the order of the model.

    A pattern means layers of batch normalization, nonlinearities in a model without any, and other modules only where
    it matches none of these: of "layer4.*" it is the normalization that is looked at, and not each convolution too.

    Raises: ValueError for a pattern that matches no module, and if there is neither kind and no pattern.
    """
    modules = dict(model.named_modules())
    usual = {path: each for path, each in modules.items() if is_batch_norm(each)}
    usual = usual or {path: each for path, each in modules.items() if is_nonlinearity(each)}
    if patterns is None:
        if not usual:
            raise ValueError(
                "no batch normalization and no nonlinearity is a module of the model: name the layers whose inputs "
                "are meant, layers=['fc2']"
            )
        chosen = set(usual)
    else:
        chosen = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            chosen |= matching(pattern, usual) or matching(pattern, modules)
            if not matching(pattern, modules):
                raise ValueError(
                    f"no module has a path like {pattern!r}: there are {', '.join(filter(None, modules))}"
                )
    dims = _dims(modules)
    return [
        Site(path, each, dims[path] if channels is None else channels)
        for path, each in modules.items()
        if path in chosen
    ]


def matching(pattern: str, paths: Iterable[str]) -> set[str]:
    """The paths that a pattern means, as of file names; a dot is nothing special."""
    return {path for path in paths if fnmatchcase(path, pattern)}


def is_nonlinearity(module: nn.Module) -> bool:
    """Whether it is an elementwise nonlinearity of torch, timm or transformers, which have them in such files."""
    file = type(module).__module__.rpartition(".")[2]
    return file.startswith("activation") and not module._modules and not isinstance(module, _SOFTMAX)


def _dims(modules: dict[str, nn.Module]) -> dict[str, int | None]:
    """Of the channels of each module's input: those of a nonlinearity are where the layer before it has them."""
    found: dict[str, int | None] = {}
    dim = 1
    for path, module in modules.items():
        if isinstance(module, _CHANNELS_FIRST) or is_batch_norm(module):
            dim = 1
        elif isinstance(module, _CHANNELS_LAST):
            # LayerNorm2d of torchvision and timm normalizes (N, C, H, W)
            dim = 1 if type(module).__name__.endswith("2d") else -1
        per_activation = is_batch_norm(module) and isinstance(getattr(module, "num_features", 0), tuple)
        found[path] = None if per_activation else dim
    return found
