"""BN, BN+ReLU and BN+add+ReLU, forward and backward in training, and forward in evaluation.

All buffers are cold, see cold.py. The unit is a copy, `y.copy_(x)`, between such buffers: the lower bound of reading
and writing the tensor once. Outputs are allocated by the layers, as in real use, and freed memory is kept for all.

The candidate "torch" is nn.BatchNorm and functional.relu as in torchvision's networks: ReLU and sum in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.bench.case import FORMATS, Case, Comparison, compile_static
from batchnorm.bench.cold import Operation, Ring, copies, counts, evaluations, passes
from batchnorm.bench.options import Dtype, Options
from batchnorm.bench.rounds import Candidate
from batchnorm.layers import BatchNorm1d, BatchNorm2d

SHAPES = (
    (32, 64, 112, 112),
    (32, 64, 56, 56),
    (32, 256, 28, 28),
    (32, 512, 14, 14),
    (32, 1024, 7, 7),
    (8, 64, 56, 56),
    (256, 1024),
    (60, 100),
)
_QUICK_SHAPES = ((4, 8, 6, 6), (16, 10))

_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def training(options: Options) -> list[Case]:
    """Forward and backward passes in training."""
    names = ("BN", "BN+ReLU", "BN+add+ReLU") if options.full else ("BN+ReLU",)
    return [case for name in names for case in _cases(options, name, train=True)]


def evaluation(options: Options) -> list[Case]:
    """Forward passes in evaluation."""
    return _cases(options, "BN+ReLU", train=False)


def _cases(options: Options, name: str, *, train: bool) -> list[Case]:
    return [
        Case(
            name,
            shape,
            layout,
            dtype,
            ("forward", "backward", "both") if train else ("evaluation",),
            _LayerComparison(options, name, shape, layout, dtype, train),
        )
        for dtype in options.dtypes
        for layout in (*FORMATS, "(N, C)")
        for shape in (_QUICK_SHAPES if options.quick else SHAPES)
        if (len(shape) == 2) == (layout == "(N, C)")
    ]


class _LayerComparison:
    """The `prepare` of a Case: builds its candidates."""

    def __init__(
        self, options: Options, name: str, shape: tuple[int, ...], layout: str, dtype: Dtype, train: bool
    ) -> None:
        self._options, self._name, self._shape = options, name, shape
        self._layout, self._dtype, self._train = layout, dtype, train

    @contextmanager
    def __call__(self) -> Iterator[Comparison]:
        seed = torch.randn(self._shape, device=self._options.device).to(_DTYPES[self._dtype])
        if self._layout in FORMATS:
            seed = seed.contiguous(memory_format=FORMATS[self._layout])
        calls, cold = counts(seed, self._options.quick)
        inputs = Ring([seed.clone().requires_grad_(self._train) for _ in range(cold)], calls)
        gradients = [seed.clone() for _ in range(calls)] if self._train else []
        targets = [torch.empty_like(seed) for _ in range(calls)]
        residuals = [seed.clone().requires_grad_() for _ in range(calls)] if "add" in self._name else []

        def candidate(operation: Operation, layer: nn.Module) -> Candidate:
            layer.train(self._train).to(seed.device)
            if self._train:
                return passes(operation, layer, inputs, residuals, gradients)
            return evaluations(operation, inputs)

        ours, torch_layer, compiled_layer = self._layers()
        comparison = Comparison(calls)
        comparison.candidates["ours"] = candidate(ours, ours)
        comparison.candidates["torch"] = candidate(_PLAIN[self._name](torch_layer), torch_layer)
        if self._options.compile:
            comparison.add_compiled(
                candidate(compile_static(_PLAIN[self._name](compiled_layer)), compiled_layer)
            )
        comparison.candidates["copy"] = copies(inputs, targets)
        yield comparison

    def _layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Ours and two of torch's."""
        channels = self._shape[1]
        activation = None if self._name == "BN" else "relu"
        if len(self._shape) == 2:
            return (
                BatchNorm1d(channels, activation=activation),
                nn.BatchNorm1d(channels),
                nn.BatchNorm1d(channels),
            )
        return (
            BatchNorm2d(channels, activation=activation),
            nn.BatchNorm2d(channels),
            nn.BatchNorm2d(channels),
        )


def _bn(layer: nn.Module) -> Operation:
    return layer


def _bn_relu(layer: nn.Module) -> Operation:
    return lambda x: F.relu(layer(x), inplace=True)


def _bn_add_relu(layer: nn.Module) -> Operation:
    return lambda x, residual: F.relu(layer(x).add_(residual), inplace=True)


_PLAIN = {"BN": _bn, "BN+ReLU": _bn_relu, "BN+add+ReLU": _bn_add_relu}
