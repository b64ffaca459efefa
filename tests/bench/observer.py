"""What a rank really exchanges in a training step: candidates for `Ranks` whose samples are counts, not seconds."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import batchnorm as bn
from batchnorm.bench.rounds import Sample
from batchnorm.models.inception import BNInception
from batchnorm.passes.estimate import inference_copy

BYTES = {"float": 4, "double": 8, "long int": 8}


def inception() -> nn.Module:
    return BNInception(10, width=0.25, stem="small")


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=10)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"inception": inception, "resnet": resnet}


@contextmanager
def _seen() -> Iterator[Sample]:
    """Every collective of the block as its backend sees it, DDP's own included: how often each, of how many bytes."""
    counts: Counter[str] = Counter()
    found: Sample = {}
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        yield found
    for event in profiler.profiler.kineto_results.events():
        kind, _, name = event.name().partition(":")
        if kind == "gloo":
            (shape,), (dtype,) = event.shapes(), event.dtypes()
            counts[f"{name} {math.prod(shape) * BYTES[dtype]}"] += 1
    found |= dict(counts)


def candidates() -> dict[str, Callable[[], Sample]]:
    """For each model, a step "without" Sync and "with" it, and "population" statistics; of one, Sync in groups of 1."""
    found: dict[str, Callable[[], Sample]] = {}
    for name, make in MODELS.items():
        found[f"{name} without"] = partial(_step, DistributedDataParallel(make()))
        found[f"{name} with"] = partial(_step, DistributedDataParallel(bn.convert_sync(make())[0]))
        found[f"{name} population"] = partial(_population, make())
    own_group, _ = dist.new_subgroups(1)
    found["inception alone"] = partial(
        _step, DistributedDataParallel(bn.convert_sync(inception(), own_group)[0])
    )
    return found


def _step(model: nn.Module) -> Sample:
    x = torch.randn(2, 3, 28, 28)
    for _ in range(
        2
    ):  # DDP arranges its buckets anew after the first step, and says so to the others in the second
        model(x).sum().backward()
    with _seen() as found:
        model(x).sum().backward()
    return found


def _population(model: nn.Module) -> Sample:
    with _seen() as found:
        inference_copy(model, [torch.randn(2, 3, 28, 28)])
    return found
