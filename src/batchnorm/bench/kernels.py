"""BN with what follows it, forward and backward in training, and in one pass over memory or several.

Every buffer is cold: inputs come from a ring of more than 300 MB, so that nobody finds them in a cache, and a sample
runs all its forward passes before its backward passes. A copy, `y.copy_(x)` between such buffers, is the unit: the
least that touching memory costs. Outputs are allocated by the layers, as in real use, and freed memory is kept for all.

torch stands for nn.BatchNorm and functional.relu as torchvision's networks write them: the ReLU and the sum in place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.bench.case import FORMATS, Case, Contest, compiled
from batchnorm.bench.options import Dtype, Options
from batchnorm.bench.rounds import Contender, Sample
from batchnorm.layers import BatchNorm1d, BatchNorm2d

Operation = Callable[..., Tensor]  # of x, and of the residual if there is one

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

_COLD = 300 * 10**6  # bytes of inputs, several times any cache
_SAMPLE = 128 * 10**6  # bytes of inputs in a sample
_CALLS = 256  # and no more calls than that
_QUICK_COLD = 10**4

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
            _Bout(options, name, shape, layout, dtype, train),
        )
        for dtype in options.dtypes
        for layout in (*FORMATS, "(N, C)")
        for shape in (_QUICK_SHAPES if options.quick else SHAPES)
        if (len(shape) == 2) == (layout == "(N, C)")
    ]


class _Bout:
    """Builds the contenders of one case."""

    def __init__(
        self, options: Options, name: str, shape: tuple[int, ...], layout: str, dtype: Dtype, train: bool
    ) -> None:
        self._options, self._name, self._shape = options, name, shape
        self._layout, self._dtype, self._train = layout, dtype, train

    @contextmanager
    def __call__(self) -> Iterator[Contest]:
        seed = torch.randn(self._shape).to(_DTYPES[self._dtype])
        if self._layout in FORMATS:
            seed = seed.contiguous(memory_format=FORMATS[self._layout])
        size = seed.numel() * seed.element_size()
        calls = 3 if self._options.quick else max(min(-(-_SAMPLE // size), _CALLS), 2)
        cold = max(-(-(_QUICK_COLD if self._options.quick else _COLD) // size), calls)

        inputs = _Ring([seed.clone().requires_grad_(self._train) for _ in range(cold)], calls)
        gradients = [seed.clone() for _ in range(calls)] if self._train else []
        targets = [torch.empty_like(seed) for _ in range(calls)]
        residuals = [seed.clone().requires_grad_() for _ in range(calls)] if "add" in self._name else []

        def contender(operation: Operation, layer: nn.Module) -> Contender:
            layer.train(self._train)
            if self._train:
                return _passes(operation, layer, inputs, residuals, gradients)
            return _evaluations(operation, inputs)

        ours, torch_s, again = self._layers()
        contest = Contest(calls)
        contest.contenders["ours"] = contender(ours, ours)
        contest.contenders["torch"] = contender(_PLAIN[self._name](torch_s), torch_s)
        if self._options.compile:
            contest.admit_compiled(contender(compiled(_PLAIN[self._name](again)), again))
        contest.contenders["copy"] = _copies(inputs, targets)
        yield contest

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


class _Ring:
    """Tensors handed out in turn, `count` at a time."""

    def __init__(self, tensors: list[Tensor], count: int) -> None:
        self._tensors, self._count = deque(tensors), count

    def take(self) -> list[Tensor]:
        taken = [self._tensors[number] for number in range(self._count)]
        self._tensors.rotate(-self._count)
        return taken


def _bn(layer: nn.Module) -> Operation:
    return layer


def _bn_relu(layer: nn.Module) -> Operation:
    return lambda x: F.relu(layer(x), inplace=True)


def _bn_add_relu(layer: nn.Module) -> Operation:
    return lambda x, residual: F.relu(layer(x).add_(residual), inplace=True)


_PLAIN = {"BN": _bn, "BN+ReLU": _bn_relu, "BN+add+ReLU": _bn_add_relu}


def _passes(
    operation: Operation,
    layer: nn.Module,
    inputs: _Ring,
    residuals: list[Tensor],
    gradients: list[Tensor],
) -> Contender:
    parameters = list(layer.parameters())

    def sample() -> Sample:
        taken = inputs.take()
        arguments = list(zip(taken, residuals, strict=True)) if residuals else [(x,) for x in taken]
        start = time.perf_counter()
        outputs = deque(operation(*tensors) for tensors in arguments)
        middle = time.perf_counter()
        for tensors, dy in zip(arguments, gradients, strict=True):
            # the output goes with its graph, as in a training step
            torch.autograd.grad(outputs.popleft(), [*tensors, *parameters], dy)
        end = time.perf_counter()
        return {"forward": (middle - start) / len(arguments), "backward": (end - middle) / len(arguments)}

    return sample


def _evaluations(operation: Operation, inputs: _Ring) -> Contender:
    def sample() -> Sample:
        taken = inputs.take()
        with torch.inference_mode():
            start = time.perf_counter()
            outputs = [operation(x) for x in taken]
            end = time.perf_counter()
        del outputs  # only now: memory that was just freed would be warm
        return {"evaluation": (end - start) / len(taken)}

    return sample


def _copies(inputs: _Ring, targets: list[Tensor]) -> Contender:
    def sample() -> Sample:
        taken = inputs.take()
        with torch.no_grad():
            start = time.perf_counter()
            for x, y in zip(taken, targets, strict=True):
                y.copy_(x)
            end = time.perf_counter()
        return {"copy": (end - start) / len(taken)}

    return sample
