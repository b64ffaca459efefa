"""Weights to start from: torchvision's and timm's files, a network or a checkpoint of `batchnorm train`.

    new_heads = load(network, Path("resnet18-f37072fd.pth"), classes=4)

A file holds a state_dict, by itself or under one of the names below. Every tensor of the network must be in it, with
its shape, but for a head for another number of classes: that keeps its initial weights, and is named.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from batchnorm.training import checkpoint
from batchnorm.training.network import NetworkError

# Where files keep the state_dict: ours; timm's, Lightning's; torchvision's.
_PLACES = ("population", "state_dict", "model_state_dict", "model")
_DEPTH = 3  # of such places in each other
_COUNTERS = "num_batches_tracked"  # absent from files of torch 0.3
_LISTED = 3


def load(network: nn.Module, path: Path, classes: int | None, key: str = "model.weights =") -> list[str]:
    """Load the weights in `path` into `network`, which has `classes` classes; return what keeps its initial weights.

    classes: None: every tensor must be in the file, also the head's.
    key: what the user has given the path to, for messages.

    Raises: NetworkError, before anything changes, for a file that is broken or of another network.
    """
    own = network.state_dict()
    found = _of_network(read_state(path, key), own)
    heads = [name for name in own if name in found and _is_other_head(found[name], own[name], classes)]
    whole = all(name in heads for name in own if _is_beside(name, own[name], heads, classes))
    others = {found[name].size(0) for name in heads}
    if len(others) > 1 or not whole:
        heads = []  # weights and biases that are not of one classifier
    wrong = [
        problem for name in own if (problem := _problem(name, found.get(name), own[name], name in heads))
    ]
    wrong += [f"{name} is not the network's" for name in found if name not in own]
    if wrong:
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise NetworkError(f"{key} {str(path)!r} are of another network: {'; '.join(wrong[:_LISTED])}{more}")
    network.load_state_dict({**own, **{name: found[name] for name in found if name not in heads}})
    return [f"{name}, which is for {found[name].size(0):,} classes in the file" for name in heads]


def _problem(name: str, found: Tensor | None, own: Tensor, is_head: bool) -> str:
    """Why `found` cannot be what the network calls `name`; empty if it can."""
    if found is None:
        return "" if name.endswith(_COUNTERS) else f"{name} is missing"
    if found.layout != torch.strided or found.is_quantized or found.is_complex():
        return f"{name} is no plain tensor"
    if is_head:
        return ""
    if found.shape != own.shape:
        return f"{name} is {_shape(found)}, not {_shape(own)}"
    if found.is_floating_point() != own.is_floating_point():
        return f"{name} is {found.dtype}, not {own.dtype}".replace("torch.", "")
    if found.is_floating_point() and not bool(found.isfinite().all()):
        return f"{name} is not finite"
    if name.endswith((_COUNTERS, "running_var")) and bool((found < 0).any()):
        return f"{name} is negative"
    return ""


def _is_beside(name: str, own: Tensor, heads: list[str], classes: int | None) -> bool:
    """Whether these are the weights or biases of a module that has one of `heads`."""
    modules = {head.rpartition(".")[0] for head in heads}
    return name.rpartition(".")[0] in modules and own.dim() > 0 and own.size(0) == classes


def _is_other_head(found: Tensor, own: Tensor, classes: int | None) -> bool:
    """Whether these are the weights or biases of one classifier, for other numbers of classes."""
    return (
        found.dim() == own.dim() > 0
        and own.size(0) == classes != found.size(0)
        and found.shape[1:] == own.shape[1:]
    )


def read_state(path: Path, key: str) -> dict[str, Tensor]:
    """The state_dict in a file, as data; `key` is what the user has given the path to. Raises: NetworkError."""
    state = _read(path, key)
    for _ in range(_DEPTH):
        place = next((each for each in _PLACES if isinstance(state, Mapping) and each in state), None)
        if isinstance(state, Mapping) and place is not None and not isinstance(state[place], Tensor):
            state = state[place]
    tensors = dict(state) if isinstance(state, Mapping) else {}
    if not tensors or not all(
        isinstance(name, str) and isinstance(each, Tensor) for name, each in tensors.items()
    ):
        raise NetworkError(f"{key} {str(path)!r} holds no state_dict of a network: torch.save one")
    return tensors


def _read(path: Path, key: str) -> object:
    """What is in a file: data, never code."""
    if not path.is_file():
        raise NetworkError(f"{key} {str(path)!r}: there is no such file")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_by_torch(path)
    except ImportError:
        raise NetworkError(
            f"{key} {str(path)!r} needs safetensors, which is not installed: pip install safetensors"
        ) from None
    except Exception:  # on files that are broken or something else, torch raises nearly any exception
        raise NetworkError(
            f"{key} {str(path)!r} cannot be read as weights: it is broken, or holds more than data; "
            "torch.save(model.state_dict(), FILE) writes one that can"
        ) from None


def _read_safetensors(path: Path) -> object:
    from safetensors.torch import load_file

    return load_file(path)


def _read_by_torch(path: Path) -> object:
    # the training scripts of torchvision and timm save their options too
    with torch.serialization.safe_globals([argparse.Namespace]):
        if zipfile.is_zipfile(path):
            return checkpoint.load(path)  # each byte by its checksum; no member larger than the file
        return torch.load(path, weights_only=True, map_location="cpu")  # as torch wrote them before 1.6


def _of_network(found: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `found` by the network's own names.

    A wrapper puts something before each: DistributedDataParallel "module.", torch.compile "_orig_mod.", Lightning the
    name of an attribute; and has tensors of its own, such as a loss's, that are left out.
    """
    names = [name for name in own if not name.endswith(_COUNTERS)]
    for key in found:
        prefix = key.removesuffix(names[0])
        if prefix and prefix != key and all(prefix + name in found for name in names):
            return {
                each.removeprefix(prefix): values for each, values in found.items() if each.startswith(prefix)
            }
    return found


def _shape(values: Tensor) -> str:
    return "×".join(map(str, values.shape)) or "a number"
