"""Evaluation: BN and ReLU as one pass over memory against torch's two, then whole networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from batchnorm.bench import kernels, networks
from batchnorm.bench.case import Case, Contest, compiled, timed
from batchnorm.bench.options import Options
from batchnorm.passes.upgrade import upgrade


def cases(options: Options) -> list[Case]:
    """The shapes of `kernels`, then each network in both layouts."""
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
def _networks(name: str, layout: str, options: Options) -> Iterator[Contest]:
    x = torch.randn(networks.shape(name, options.size, options.batch))
    model, x = networks.lay_out(networks.build(name), x, layout)
    networks.settle(model, x)
    ours, _ = upgrade(deepcopy(model))
    contest = Contest(networks.NETWORKS[name])
    for who, one in {"ours": ours, "torch": model}.items():
        contest.contenders[who] = timed("evaluation", _evaluation(one.eval(), x), contest.calls)
    if options.compile:
        call = _evaluation(compiled(deepcopy(model)), x)
        contest.admit_compiled(timed("evaluation", call, contest.calls))
    yield contest


def _evaluation(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.inference_mode():
            output: Tensor = model(x)
        return output

    return call
