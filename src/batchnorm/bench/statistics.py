"""The cost of `statistics=` and of a mask, compared with the same layer without them and with other implementations.

plain        our layer with the batch's own moments, without a mask
loop         torch.nn.BatchNorm2d on each group, and a concatenation
timm         its SplitBatchNorm2d with one split per group
Keras        its BatchNormalization, on its torch backend
torch        for Population its layer in evaluation mode, for per activation its BatchNorm1d on the flattened input
by hand      the formula in torch's operations, as users write it
collectives  the collectives of Sync alone

timm and Keras are compared if they are installed. Layers have no activation; inputs are cold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench import exchange, networks
from batchnorm.bench.case import FORMATS, Case, Comparison, time_calls
from batchnorm.bench.cold import Operation, Ring, copies, counts, passes
from batchnorm.bench.options import Options
from batchnorm.bench.ranks import Ranks
from batchnorm.layers import BatchNorm1d, BatchNorm2d, _BatchNorm
from batchnorm.passes.upgrade import upgrade
from batchnorm.passes.virtual_batch import virtual_batch
from batchnorm.statistics import Ghost, Population, Renorm

Baselines = dict[
    str, tuple[Operation, nn.Module]
]  # by name: the operation, and the layer whose parameters' gradients are computed

_IMAGES = ((32, 64, 56, 56), (32, 256, 14, 14))
_QUICK_IMAGES = ((4, 8, 6, 6),)
_SEQUENCES = ((32, 256, 400),)
_QUICK_SEQUENCES = ((4, 8, 12),)
_SINGLE = ((32, 1024, 7, 7),)
_GROUP = 16  # samples of a ghost batch
_MICRO = 8  # micro-batches of a virtual batch


def cases(options: Options) -> list[Case]:
    """Layers in one process, layers over two, and a network in micro-batches."""
    images = _QUICK_IMAGES if options.quick else _IMAGES
    single = _QUICK_IMAGES if options.quick else _SINGLE
    layers = [
        *((f"Ghost({_group(options)})", shape, layout, _ghost) for shape in images for layout in FORMATS),
        *(("Renorm", shape, layout, _renorm) for shape in images for layout in FORMATS),
        *(("Population", shape, layout, _population) for shape in images for layout in FORMATS),
        *(("mask", shape, layout, _mask) for shape in images for layout in FORMATS),
        *(
            ("mask", shape, "(N, C, L)", _mask)
            for shape in (_QUICK_SEQUENCES if options.quick else _SEQUENCES)
        ),
        *(("per activation", shape, "NCHW", _each_activation) for shape in single),
    ]
    found = [
        Case(
            name,
            shape,
            layout,
            "float32",
            ("forward", "backward", "both"),
            partial(_alone, build, shape, layout, options),
        )
        for name, shape, layout, build in layers
    ]
    found += [
        Case(
            "Sync, 2 ranks",
            shape,
            "NCHW",
            "float32",
            ("forward", "backward", "both"),
            partial(_over_ranks, shape, options),
        )
        for shape in ((4, 8) if options.quick else (60, 100), *images, *single)
    ]
    if options.networks:
        shape = networks.shape("resnet18", options.size, 2 * _MICRO if options.quick else options.batch)
        found.append(Case("virtual_batch", shape, "NCHW", "float32", ("step",), partial(_virtual, shape)))
    return found


def _group(options: Options) -> int:
    return 2 if options.quick else _GROUP


@contextmanager
def _alone(
    build: Callable[..., Baselines], shape: tuple[int, ...], layout: str, options: Options
) -> Iterator[Comparison]:
    seed = torch.randn(shape)
    if layout in FORMATS:
        seed = seed.contiguous(memory_format=FORMATS[layout])
    calls, cold = counts(seed, options.quick)
    inputs = Ring([seed.clone().requires_grad_() for _ in range(cold)], calls)
    gradients = [seed.clone() for _ in range(calls)]
    comparison = Comparison(calls)
    plain = _layer(shape)
    baselines: Baselines = build(seed, options, comparison.notes)
    baselines["plain"] = (plain, plain)
    for name, (operation, layer) in baselines.items():
        comparison.candidates[name] = passes(operation, layer.train(), inputs, [], gradients)
    comparison.candidates["copy"] = copies(inputs, [torch.empty_like(seed) for _ in range(calls)])
    yield comparison


def _layer(shape: tuple[int, ...], **settings: Any) -> _BatchNorm:
    return (BatchNorm2d if len(shape) == 4 else BatchNorm1d)(shape[1], **settings)


def _ours(layer: nn.Module) -> Baselines:
    return {"ours": (layer, layer)}


def _ghost(seed: Tensor, options: Options, notes: list[str]) -> Baselines:
    size = _group(options)
    loop = nn.BatchNorm2d(seed.size(1))
    baselines = _ours(_layer(tuple(seed.shape), statistics=Ghost(size)))
    baselines["loop"] = (lambda x: torch.cat([loop(part) for part in x.split(size)]), loop)
    if _is_installed("timm", notes):
        split = import_module("timm.layers").SplitBatchNorm2d(seed.size(1), num_splits=seed.size(0) // size)
        baselines["timm"] = (split, split)
    return baselines


def _renorm(seed: Tensor, options: Options, notes: list[str]) -> Baselines:
    baselines = _ours(_layer(tuple(seed.shape), statistics=Renorm()))
    if _is_installed("keras", notes):
        baselines["Keras"] = _keras(
            seed, renorm=True, renorm_clipping={"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0}
        )
    return baselines


def _population(seed: Tensor, options: Options, notes: list[str]) -> Baselines:
    baselines = _ours(_layer(tuple(seed.shape), statistics=Population()))
    torch_layer = nn.BatchNorm2d(seed.size(1))
    baselines["torch"] = (lambda x: torch_layer.eval()(x), torch_layer)
    return baselines


def _mask(seed: Tensor, options: Options, notes: list[str]) -> Baselines:
    # three quarters of the positions are valid, the first ones
    positions = seed[0, 0].numel()
    lengths = torch.linspace(positions // 2, positions, seed.size(0)).long()
    mask = (torch.arange(positions) < lengths[:, None]).reshape(seed.size(0), 1, *seed.shape[2:])
    ours, by_hand = _layer(tuple(seed.shape)), _layer(tuple(seed.shape))
    baselines: Baselines = {
        "ours": (lambda x: ours(x, mask=mask), ours),
        "by hand": (partial(_masked_by_hand, by_hand, mask), by_hand),
    }
    if _is_installed("keras", notes):
        # its mask needs the channels in the last dimension; a view is enough
        operation, layer = _keras(seed.movedim(1, -1), axis=-1)
        baselines["Keras"] = (
            lambda x: operation(x.movedim(1, -1), mask=mask[:, 0]).movedim(-1, 1),
            layer,
        )
    return baselines


def _masked_by_hand(layer: nn.Module, mask: Tensor, x: Tensor) -> Tensor:
    """The masked layer as users of torch write it."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    dims = [0, *range(2, x.dim())]
    weight = mask.to(x.dtype)
    count = weight.sum()
    mean = (x * weight).sum(dims, keepdim=True) / count
    centred = (x - mean) * weight
    var = centred.square().sum(dims, keepdim=True) / count
    return centred * torch.rsqrt(var + 1e-5) * layer.weight.view(shape) + layer.bias.view(shape) * weight  # type: ignore[operator]


def _each_activation(seed: Tensor, options: Options, notes: list[str]) -> Baselines:
    ours = BatchNorm2d(tuple(seed.shape[1:]))
    torch_layer = nn.BatchNorm1d(seed[0].numel())
    return {
        "ours": (ours, ours),
        "torch": (lambda x: torch_layer(x.flatten(1)).view_as(x), torch_layer),
    }


def _is_installed(name: str, notes: list[str]) -> bool:
    if find_spec(name) is not None:
        return True
    notes.append(f"{name} is not installed")
    return False


def _keras(seed: Tensor, axis: int = 1, **settings: Any) -> tuple[Operation, nn.Module]:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = import_module("keras")
    layer = keras.layers.BatchNormalization(axis=axis, momentum=0.9, epsilon=1e-5, **settings)
    with torch.no_grad():
        layer(seed)
    return lambda x, **named: layer(x, training=True, **named), layer


@contextmanager
def _over_ranks(shape: tuple[int, ...], options: Options) -> Iterator[Comparison]:
    """Sync over 2 ranks; each has a batch of `shape` and one thread."""
    with Ranks(2, partial(exchange.candidates, shape, options.quick), exchange.TURNS) as ranks:
        names = {"ours": "sync", "plain": "plain", "collectives": "collectives"}
        yield Comparison(
            exchange.calls(shape), {candidate: partial(ranks, name) for candidate, name in names.items()}
        )


@contextmanager
def _virtual(shape: tuple[int, ...]) -> Iterator[Comparison]:
    model, _ = upgrade(networks.build("resnet18"))
    x, target = torch.randn(shape), torch.randint(10, shape[:1])
    size = max(1, shape[0] // _MICRO)

    def one_batch(model: nn.Module) -> None:
        nn.functional.cross_entropy(model(x), target).backward()

    def accumulated(model: nn.Module) -> None:
        for part, part_target in zip(x.split(size), target.split(size), strict=True):
            (nn.functional.cross_entropy(model(part), part_target) * len(part) / len(x)).backward()

    def virtual(model: nn.Module) -> None:
        with virtual_batch(model, x.split(size)):
            accumulated(model)

    comparison = Comparison(1)
    for name, run in {"ours": virtual, "one batch": one_batch, "accumulation": accumulated}.items():
        comparison.candidates[name] = time_calls("step", partial(run, deepcopy(model)), 1)
    yield comparison
