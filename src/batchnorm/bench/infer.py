"""Evaluation: BN and ReLU as one pass over memory against torch's two, then whole networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from batchnorm.bench import kernels, networks
from batchnorm.bench.case import Case, Comparison, compile_static, time_calls
from batchnorm.bench.options import Options
from batchnorm.passes.upgrade import upgrade


def cases(options: Options) -> list[Case]:
    """The layers of `kernels` in evaluation, then each network in both layouts."""
    return kernels.evaluation(options) + [
        Case(
            name,
            networks.shape(name, options.size, options.batch),
            layout,
            "float32",
            ("evaluation",),
            partial(_networks, name, layout, options),
        )
        for name in options.networks
        for layout in networks.layouts(name)
    ]


@contextmanager
def _networks(name: str, layout: str, options: Options) -> Iterator[Comparison]:
    x = torch.randn(networks.shape(name, options.size, options.batch))
    model, x = networks.to_layout(networks.build(name), x, layout)
    networks.set_running_statistics(model, x)
    ours, _ = upgrade(deepcopy(model))
    comparison = Comparison(networks.NETWORKS[name])
    for candidate, network_model in {"ours": ours, "torch": model}.items():
        comparison.candidates[candidate] = time_calls(
            "evaluation", _evaluation(network_model.eval(), x), comparison.calls
        )
    if options.compile:
        call = _evaluation(compile_static(deepcopy(model)), x)
        comparison.add_compiled(time_calls("evaluation", call, comparison.calls))
    yield comparison


def _evaluation(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.inference_mode():
            output: Tensor = model(x)
        return output

    return call
