"""The memory of a training step, and its time: torch, ours, `save_memory`, checkpointing, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchnorm.bench import networks
from batchnorm.bench.case import Case, Comparison, compile_static, time_calls
from batchnorm.bench.options import Options
from batchnorm.bench.rows import Memory
from batchnorm.graph.activation_memory import peak_bytes, saved_bytes
from batchnorm.passes.save_memory import save_memory
from batchnorm.passes.upgrade import upgrade

# What is repeated as one: the blocks of these networks.
_BLOCKS = ("BasicBlock", "Bottleneck", "InvertedResidual", "_DenseLayer", "Inception")
_MB = 1e6


def cases(options: Options) -> list[Case]:
    """A training step of each network."""
    return [
        Case(
            name,
            networks.shape(name, options.size, options.batch),
            "NCHW",
            "float32",
            ("step",),
            partial(_network, name, options),
        )
        for name in options.networks
    ]


@contextmanager
def _network(name: str, options: Options) -> Iterator[Comparison]:
    x = torch.randn(networks.shape(name, options.size, options.batch))
    model = networks.build(name)
    upgraded, _ = upgrade(deepcopy(model))
    models = {
        "ours": save_memory(deepcopy(upgraded))[0],
        "upgraded": upgraded,
        "torch, saved": save_memory(deepcopy(model))[0],
        "torch": deepcopy(model),
    }
    comparison = Comparison(1)
    repeated = checkpointed(deepcopy(model))
    if repeated is None:
        comparison.notes.append("it has no blocks that could be checkpointed")
    else:
        models["checkpoint"] = repeated
    for candidate, network in models.items():
        comparison.candidates[candidate] = time_calls("step", networks.step(network, x), comparison.calls)
        comparison.memory[candidate] = _memory(network, x)
    if options.compile:
        compiled = compile_static(deepcopy(model))
        comparison.add_compiled(time_calls("step", networks.step(compiled, x), comparison.calls))
        if "compile" in comparison.candidates:
            comparison.memory["compile"] = _memory(compiled, x)
    if find_spec("inplace_abn") is None:
        comparison.notes.append("inplace_abn is not compared: it is not installed")
    else:
        try:
            network = _in_place(deepcopy(model))
            comparison.memory["inplace_abn"] = _memory(network, x)
        except RuntimeError:  # what it has changed in place is changed again, as by a residual sum
            comparison.notes.append("inplace_abn's layers cannot just take the place of BN in it")
        else:
            call = networks.step(network, x)
            comparison.candidates["inplace_abn"] = time_calls("step", call, comparison.calls)
    yield comparison


def checkpointed(model: nn.Module) -> nn.Module | None:
    """`model` with each block within torch.utils.checkpoint; None if there are none."""
    blocks = [each for each in model.modules() if type(each).__name__ in _BLOCKS]
    for block in blocks:
        block.forward = partial(_repeated, block.forward)
    return model if blocks else None


def _repeated(forward: Callable[..., Any], *inputs: Any) -> Any:
    # a list of features grows behind the block that read it
    now = (list(each) if isinstance(each, list) else each for each in inputs)
    return checkpoint(forward, *now, use_reentrant=False)


def _in_place(model: nn.Module) -> nn.Module:
    """`model` with inplace_abn's layers, whose activation is a leaky ReLU, where ours fuse a ReLU."""
    layer: Any = import_module("inplace_abn").InPlaceABN
    fused, _ = upgrade(model)
    for parent in list(fused.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                slope = 0.01 if getattr(child, "activation", None) else 1.0
                setattr(parent, name, layer(child.num_features, activation_param=slope))
    return fused


def _memory(model: nn.Module, x: Tensor) -> Memory:
    """Megabytes beyond weights and gradients."""
    target = torch.randint(10, (len(x),))

    def step() -> None:
        nn.functional.cross_entropy(model(x), target).backward()

    step()  # what is allocated once
    model.zero_grad()
    peak = peak_bytes(step, x.device)
    gradients = sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)
    model.zero_grad()
    saved = saved_bytes(lambda: model(x), (x, *model.parameters(), *model.buffers()))
    return Memory(peak=(peak - gradients) / _MB, saved=saved / _MB)
