"""Other people's tools that would drop, silently, what a layer of ours does beside torch's; here they are stopped.

Three ways, each where such a tool looks; docs/architecture.md says why, and why no others:

- Some build a layer, or fold one, from the attributes of ours. All of them read `eps`, which knows who asks.
- Some compare classes exactly and have a registry of them. There ours stand with an error for an entry.
- Some compare classes exactly and trace the model with torch.fx, or walk through its modules. A layer that is traced,
  or visited, knows by whom.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

from torch import nn
from torch.ao.quantization import fuser_method_mappings

# Functions that read the attributes of a layer to make something else of it, and what to call in their place.
_BUILDERS = {
    "convert_sync_batchnorm": "bn.convert_sync(model)",  # torch's, which Lightning calls, and timm's
    "convert_syncbn_model": "bn.convert_sync(model)",  # apex
    "freeze_batch_norm_2d": "bn.freeze(model)",  # timm
    "convert_frozen_batchnorm": "bn.freeze(model)",  # detectron2
    "fuse_conv_bn_eval": "bn.downgrade(model) first",  # torch
    "fuse_linear_bn_eval": "bn.downgrade(model) first",  # torch
    "fuse_conv_and_bn": "bn.downgrade(model) first",  # ultralytics
    "_fuse_bn_tensor": "bn.downgrade(model) first",  # timm's and others' networks that are reparametrized
    "fuse": "bn.downgrade(model) first",  # LeViT, RepViT, ...
}
# Those after which a layer still trains, and so needs more than its activation.
_TRAINED = ("convert_sync_batchnorm", "convert_syncbn_model")


def check_reader(reader: FrameType, dropped: Callable[[bool], list[str]]) -> None:
    """Raise RuntimeError if the function `reader` makes something of a layer and would drop a part of it.

    dropped: what a layer has that torch's lacks; called with whether it will be trained.
    """
    name = reader.f_code.co_name
    advice = _BUILDERS.get(name)
    if advice is None:
        return
    lost = dropped(name in _TRAINED)
    if lost:
        home = reader.f_globals.get("__name__", "")
        raise RuntimeError(
            f"{name} of {home} knows nothing of {', '.join(lost)}, which it would drop: call {advice}"
        )


def check_tracer(tracer: Any) -> None:
    """Raise RuntimeError if torch.fx traces for a tool that fuses or quantizes layers of torch's classes alone."""
    tool = "FX quantization" if type(tracer).__name__ == "QuantizationTracer" else ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not tool:
        if (
            frame.f_code.co_name == "fuse"
            and frame.f_globals.get("__name__") == "torch.fx.experimental.optimization"
        ):
            tool = "torch.fx.experimental.optimization.fuse"
        frame = frame.f_back
    if tool:
        raise RuntimeError(f"{tool} handles layers of torch's classes alone: call bn.downgrade(model) first")


def check_walker(walker: FrameType | None) -> None:
    """Raise RuntimeError if a `fuse_model`, as torchvision's, walks through the modules for those of exact classes."""
    while walker is not None and walker.f_code.co_name in ("named_modules", "modules"):
        walker = walker.f_back
    if walker is not None and walker.f_code.co_name == "fuse_model":
        raise RuntimeError(
            "fuse_model fuses modules of exact classes, which upgraded ones are not: call bn.downgrade(model) first"
        )


def read_by_ddp(reader: FrameType) -> bool:
    """Whether `reader` is where DistributedDataParallel notes which models have synchronized layers.

    And not where it looks for torch's, to refuse those on a CPU.
    """
    home = reader.f_globals.get("__name__")
    return home == "torch.nn.parallel.distributed" and reader.f_code.co_name == "_ddp_init_helper"


def register(ours: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Let torch's eager quantization refuse the layers `ours`, by torch's class that each is derived from."""
    methods = fuser_method_mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD
    for pattern in list(methods):
        replaced = tuple(ours.get(kind, kind) for kind in pattern)
        if replaced == pattern:
            continue
        # where the activation is fused, an Identity may stand in its place
        choices = [(kind, nn.Identity) if kind is nn.ReLU else (kind,) for kind in replaced]
        for types in itertools.product(*choices):
            methods.setdefault(types, _refuse_to_fuse)


def _refuse_to_fuse(is_qat: bool, *modules: nn.Module) -> nn.Module:
    listed = ", ".join(type(module).__name__ for module in modules)
    raise RuntimeError(
        f"fuse_modules cannot fuse ({listed}) of batchnorm's layers: call bn.downgrade(model) first"
    )


def register_in_opacus(kinds: Iterable[type[nn.Module]], dropped: Callable[[Any], list[str]]) -> None:
    """Let opacus, if it is there, find `kinds` as it finds the layers of torch that each is derived from."""
    validators = sys.modules.get("opacus.validators.module_validator")
    if validators is None:
        return
    known = validators.ModuleValidator
    for kind in kinds:
        if kind in known.FIXERS:
            return
        theirs = next((base for base in kind.__mro__ if base in known.FIXERS), nn.BatchNorm2d)
        known.VALIDATORS[kind] = known.VALIDATORS[theirs]
        known.FIXERS[kind] = _fixer(known.FIXERS[theirs], dropped)


def _fixer(fix: Callable[..., nn.Module], dropped: Callable[[Any], list[str]]) -> Callable[..., nn.Module]:
    def checked(layer: nn.Module, **options: Any) -> nn.Module:
        lost = dropped(layer)
        if lost:
            raise RuntimeError(f"opacus's fix would drop {', '.join(lost)}: call bn.downgrade(model) first")
        return fix(layer, **options)

    return checked
