"""Whole training steps: forward, loss, backward, SGD.

"without BN" is the same network with identities in place of BN: what the others take beyond it is what BN costs.
"own settings" compares settings, not layers: ours, channels-last and with memory kept, against torch as it comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch

from batchnorm.bench import networks
from batchnorm.bench.case import Case, Contest, compiled, timed
from batchnorm.bench.options import Options
from batchnorm.bench.process import Process
from batchnorm.passes.upgrade import upgrade


def cases(options: Options) -> list[Case]:
    """Each network in both layouts, then each in two processes of their own settings."""
    # all of the MLP's tensors are small, and have no layout
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
def _layers(name: str, layout: str, options: Options) -> Iterator[Contest]:
    x = torch.randn(networks.shape(name, options.size, options.batch))
    model, x = networks.lay_out(networks.build(name), x, layout)
    ours, _ = upgrade(deepcopy(model))
    models = {"ours": ours, "torch": model, "without BN": networks.without_norm(model, x)}
    contest = Contest(networks.NETWORKS[name])
    for who, one in models.items():
        contest.contenders[who] = timed("step", networks.step(one, x), contest.calls)
    if options.compile:
        call = networks.step(compiled(deepcopy(model)), x)
        contest.admit_compiled(timed("step", call, contest.calls))
    yield contest


@contextmanager
def _processes(name: str, layout: str, options: Options) -> Iterator[Contest]:
    with (
        Process(name, options.size, options.batch, tuned=True) as ours,
        Process(name, options.size, options.batch, tuned=False) as plain,
    ):
        yield Contest(networks.NETWORKS[name], {"ours": ours, "torch": plain})
