"""A training step in 1, 2 and 4 processes, with and without Sync, and the collectives alone.

Every process is a rank of a gloo group, with one thread, its own batch and DistributedDataParallel with its defaults.

plain   each rank normalises by its own batch
ours    Sync: all ranks normalise by the batches of all
others  a collective between computations, from which link.py predicts the cost of Sync
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from batchnorm.bench import networks
from batchnorm.bench.case import Case, Comparison, time_calls
from batchnorm.bench.link import COLLECTIVES
from batchnorm.bench.options import Options
from batchnorm.bench.ranks import Ranks
from batchnorm.bench.rounds import Candidate, Sample
from batchnorm.bench.rows import Processes
from batchnorm.bench.traffic import Collective
from batchnorm.models.inception import BNInception
from batchnorm.passes.convert_sync import convert_sync
from batchnorm.statistics.process_group import all_gather
from batchnorm.training.workers import available_cores

_SIZE = 28  # pixels
_TURNS = 3
_CALLS = 20  # of a collective in a sample
# A convolution of this shape takes about as long as the computation between two of Sync's collectives in a step.
_COMPUTED = (8, 32, _SIZE, _SIZE)


def network() -> BNInception:
    """The trained network: the paper's Inception at a quarter of its width, for ten classes of small grey images."""
    return BNInception(10, width=0.25, stem="small", in_channels=1)


def cases(options: Options) -> list[Case]:
    """One for each number of processes."""
    shape = (options.batch, 1, _SIZE, _SIZE)
    cores = available_cores()
    return [
        Case(
            f"BNInception/4, {count} rank{'s' * (count > 1)}",
            shape,
            "NCHW",
            "float32",
            ("step",),
            partial(_in_processes, count, shape, 1 if options.quick else _TURNS),
            Processes(count=count, cores=cores),
        )
        for count in ((1, 2) if options.quick else (1, 2, 4))
    ]


@contextmanager
def _in_processes(count: int, shape: tuple[int, ...], turns: int) -> Iterator[Comparison]:
    comparison = Comparison(1)
    if count > (cores := available_cores()):
        comparison.notes.append(
            f"{count} ranks share {cores} cores, so that ranks wait for a core as well as for each other"
        )
    with Ranks(count, partial(candidates, shape), turns) as ranks:
        comparison.candidates |= {name: partial(ranks, name) for name in ("ours", "plain", *COLLECTIVES)}
        yield comparison


def candidates(shape: tuple[int, ...]) -> Mapping[str, Candidate]:
    """The candidates of one rank, which has a batch of `shape`."""
    torch.manual_seed(dist.get_rank())
    x = torch.randn(shape)
    model = network()
    models = {"ours": convert_sync(deepcopy(model))[0], "plain": model}
    found = {
        name: time_calls("step", networks.step(DistributedDataParallel(each), x), 1)
        for name, each in models.items()
    }
    found |= {name: partial(_alone, collective) for name, collective in COLLECTIVES.items()}
    return {name: partial(_after_barrier, candidate) for name, candidate in found.items()}


def _after_barrier(candidate: Candidate) -> Sample:
    """A sample after a barrier, so that it does not include waiting for a rank that is still busy."""
    dist.barrier()
    return candidate()


def _alone(collective: Collective) -> Sample:
    """The time of a collective with computation between one and the next, as in a step.

    Back to back they would be faster: no rank would sleep and have to be woken.
    """
    tensor = torch.zeros(collective.bytes // torch.float64.itemsize, dtype=torch.float64)
    gathered = tensor.new_empty(dist.get_world_size() * tensor.numel())
    images, weight = torch.randn(_COMPUTED), torch.randn(_COMPUTED[1], _COMPUTED[1], 3, 3)
    seconds = 0.0
    for _ in range(_CALLS):
        torch.conv2d(images, weight, padding=1)
        start = time.perf_counter()
        if collective.name == "all_gather":
            all_gather(gathered, tensor)
        else:
            dist.all_reduce(tensor)
        seconds += time.perf_counter() - start
    return {"step": seconds / _CALLS}
