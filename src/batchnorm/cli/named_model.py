"""MODEL on the command line: a network of torchvision, timm or the user's own code, or one that was trained here."""

from __future__ import annotations

import ast
import importlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli.terminal import Failure, as_failure

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, package.module:FACTORY (a function or class that makes a "
        "torch.nn.Module), or the folder of a run of batchnorm train.",
        show_default=False,
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Its weights: a state_dict, or safetensors. Read as data: nothing in it is run.",
        show_default="random weights",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An argument of the factory, num_classes=10; repeat.",
        show_default=False,
    ),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="N,C,H,W",
        help="The shape of an example input; repeat for several.",
        show_default="a batch of one image of the network's size",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DtypeOption = Annotated[
    str,
    typer.Option("--dtype", metavar="float32|float64|bfloat16|float16", help="Of the weights and inputs."),
]

_SIZES = (224, 299, 256, 384, 112, 64, 32)


@dataclass(frozen=True)
class NamedModel:
    """A network, example inputs of it, and whether it has weights that are not random.

    size: the side of its images, None if it is not known.
    channels: of its images.
    mean, std: what is subtracted of pixels between 0 and 1, and by what they are divided then.
    dtype: of its inputs.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    has_weights: bool
    size: int | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype


def find(
    name: str,
    weights: Path | None,
    settings: Sequence[str],
    shapes: Sequence[str],
    dtype: str,
    needs_example: bool = True,
) -> NamedModel:
    """The network that a user has named.

    needs_example: whether one is refused of which no example input is known.

    Raises: Failure.
    """
    import torch

    from batchnorm.training.network import NetworkError

    if dtype not in ("float32", "float64", "bfloat16", "float16"):
        raise Failure(f"--dtype {dtype}: choose float32, float64, bfloat16 or float16")
    options = _settings(settings)
    trained = Path(name).exists()
    made = _trained(Path(name), options, weights) if trained else _made(name, options)
    model, size, channels = made.model, made.size, made.channels
    if weights is not None:
        from batchnorm.training.weights import load

        with as_failure(NetworkError):
            load(model, weights, None, "--weights")
    model = model.to(getattr(torch, dtype)).eval()
    inputs = tuple(_images(each, dtype) for each in shapes)
    try:
        inputs = inputs or _examples(name, model, size, channels, dtype)
    except Failure:
        if needs_example:
            raise
    if inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].dim() == 4:
        size = size if size is not None and not shapes else inputs[0].shape[-1]
        channels = inputs[0].shape[1]
    has_weights = trained or weights is not None
    return NamedModel(model, inputs, has_weights, size, channels, made.mean, made.std, getattr(torch, dtype))


@dataclass(frozen=True)
class _Made:
    """A network, and what is known of its images; without a mean they are in [-1, 1]."""

    model: nn.Module
    size: int | None = None
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)


def _trained(path: Path, options: dict[str, Any], weights: Path | None) -> _Made:
    from batchnorm.training import evaluation
    from batchnorm.training.network import NetworkError

    if options or weights is not None:
        raise Failure(f"{path} is a trained network, with its weights: leave out --set and --weights")
    with as_failure(NetworkError, OSError):
        saved = evaluation.load_network(evaluation.network_file(path, "best.pt"))
    return _Made(saved.network.cpu(), saved.config.data.image_size, saved.channels)


def _made(name: str, options: dict[str, Any]) -> _Made:
    """The network with random weights."""
    from torch import nn

    home, colon, own = name.partition(":")
    if not colon or not home or not own:
        raise Failure(
            f"{name} is no folder of a run, and no torchvision:NAME, timm:NAME or package.module:FACTORY"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        try:
            if home == "torchvision":
                return _torchvision_s(own, options)
            if home == "timm":
                return _timm_s(own, options)
            factory = _of_user(home, own)
            model = factory if isinstance(factory, nn.Module) else factory(**options)
        except Failure:
            raise
        except Exception as error:  # of the user's code, or of a library's
            raise Failure(f"{name} cannot be made: {_line(error)} ({type(error).__name__})") from None
    if not isinstance(model, nn.Module):
        raise Failure(f"{name} makes a {type(model).__name__}, not a torch.nn.Module")
    return _Made(model)


def _torchvision_s(name: str, options: dict[str, Any]) -> _Made:
    from torchvision import models

    if name not in models.list_models():
        raise Failure(f"torchvision has no {name}{_near(name, models.list_models())}")
    if "weights_backbone" in models.get_model_builder(name).__code__.co_varnames or "detection" in str(
        models.get_model_builder(name).__module__
    ):
        options = {"weights_backbone": None, **options}
    model: nn.Module = models.get_model(name, weights=None, **options)
    best = list(models.get_model_weights(name))
    transform = best[0].transforms() if best else None
    size = getattr(transform, "crop_size", None)
    mean, std = (tuple(getattr(transform, each, None) or (0.5,)) for each in ("mean", "std"))
    if "detection" in str(models.get_model_builder(name).__module__):
        mean, std = (0.0,), (1.0,)  # it normalises images itself
    return _Made(model, size[0] if isinstance(size, list) else size, 3, mean, std)


def _timm_s(name: str, options: dict[str, Any]) -> _Made:
    import timm

    if not timm.is_model(name):
        raise Failure(f"timm has no {name}{_near(name, timm.list_models())}")
    model: Any = timm.create_model(name, pretrained=False, **options)
    channels, size, *_ = model.default_cfg.get("input_size", (3, 224, 224))
    size = options.get("img_size", size)
    channels = options.get("in_chans", channels)
    mean, std = (tuple(model.default_cfg.get(each, (0.5,))) for each in ("mean", "std"))
    if len(mean) not in (1, channels):
        mean, std = (0.5,), (0.5,)
    return _Made(model, size, channels, mean, std)


def _of_user(home: str, own: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it: the user's code is in this folder
    try:
        found: Any = importlib.import_module(home)
        for part in own.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise Failure(
            f"{home} cannot be imported: there is no module {error.name} in this folder or among the packages"
        ) from None
    except AttributeError:
        raise Failure(f"{home} has no {own}") from None
    return found


def _near(name: str, known: Sequence[str]) -> str:
    import difflib

    found = difflib.get_close_matches(name, known, 3)
    return f": did you mean {' or '.join(found)}?" if found else ""


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise Failure(f"--set {pair}: write KEY=VALUE, as num_classes=10")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def _images(shape: str, dtype: str) -> Tensor:
    import torch

    try:
        sizes = [int(each) for each in shape.replace("x", ",").split(",")]
        if not all(0 < size < 2**31 for size in sizes):
            raise ValueError
    except ValueError:
        raise Failure(f"--input {shape}: write whole numbers, as 1,3,224,224") from None
    generator = torch.Generator().manual_seed(0)
    return torch.rand(sizes, generator=generator).to(getattr(torch, dtype))


def _examples(name: str, model: nn.Module, size: int | None, channels: int, dtype: str) -> tuple[Any, ...]:
    """One image of the size of the network, or of the first of a few sizes that it takes."""
    import copy

    import torch

    module = type(model).__module__
    error: Exception | None = None
    sizes = [(channels, side) for side in ((size,) if size else _SIZES)]
    if channels == 3 and size is None:  # a network of the user's
        sizes += [(1, side) for side in (*_SIZES, 28)]
    for width, side in sizes:
        shape = f"1,{width},16,{side},{side}" if ".video." in module else f"1,{width},{side},{side}"
        images = _images(shape, dtype)
        inputs = ([*images],) if "torchvision.models.detection" in module else (images,)
        try:
            with torch.no_grad():
                copy.deepcopy(model)(*inputs)
        except Exception as why:
            error = error or why
            continue
        return inputs
    raise Failure(f"{name} takes no batch of one image ({_line(error)}): say what it takes, --input N,C,H,W")


def _line(error: BaseException | None) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
