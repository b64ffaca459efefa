"""Whole training steps: forward, loss, backward, SGD.

"without BN" is the same network with nn.Identity in place of BN; the difference to it is the cost of BN.
"own settings" compares settings, not layers: ours, channels-last and with freed memory kept, against torch's defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch

from batchnorm.bench import networks
from batchnorm.bench.case import Case, Comparison, compile_static, time_calls
from batchnorm.bench.options import Options
from batchnorm.bench.process import Process
from batchnorm.passes.upgrade import upgrade


def cases(options: Options) -> list[Case]:
    """Each network in both layouts, then each with "own settings" in two processes."""
    # the MLP's tensors are small and have no layout
    layouts = [(name, layout) for name in options.networks for layout in networks.layouts(name)]
    settings = [(name, "own settings") for name in options.networks if name != "mlp"]
    return [
        Case(
            name,
            networks.shape(name, options.size, options.batch),
            layout,
            "float32",
            ("step",),
            partial(_processes if layout == "own settings" else _layers, name, layout, options),
        )
        for name, layout in layouts + settings
    ]


@contextmanager
def _layers(name: str, layout: str, options: Options) -> Iterator[Comparison]:
    x = torch.randn(networks.shape(name, options.size, options.batch))
    model, x = networks.to_layout(networks.build(name), x, layout)
    ours, _ = upgrade(deepcopy(model))
    models = {"ours": ours, "torch": model, "without BN": networks.without_norm(model, x)}
    comparison = Comparison(networks.NETWORKS[name])
    for candidate, network_model in models.items():
        comparison.candidates[candidate] = time_calls(
            "step", networks.step(network_model, x), comparison.calls
        )
    if options.compile:
        call = networks.step(compile_static(deepcopy(model)), x)
        comparison.add_compiled(time_calls("step", call, comparison.calls))
    yield comparison


@contextmanager
def _processes(name: str, layout: str, options: Options) -> Iterator[Comparison]:
    with (
        Process(name, options.size, options.batch, tuned=True) as ours,
        Process(name, options.size, options.batch, tuned=False) as plain,
    ):
        yield Comparison(networks.NETWORKS[name], {"ours": ours, "torch": plain})
