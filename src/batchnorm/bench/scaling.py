"""A training step in 1, 2 and 4 processes, with Sync and without, and the collectives by themselves.

Every process is a rank of gloo's and has one thread, a batch of its own and DistributedDataParallel with its defaults.

plain   each rank normalises by its own batch
ours    Sync: all ranks by the batches of all
others  a collective between computations, by which link.py predicts what Sync costs
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
from batchnorm.bench.case import Case, Contest, timed
from batchnorm.bench.link import BARE
from batchnorm.bench.options import Options
from batchnorm.bench.ranks import Ranks
from batchnorm.bench.rounds import Contender, Sample
from batchnorm.bench.rows import Processes
from batchnorm.bench.traffic import Collective
from batchnorm.models.inception import BNInception
from batchnorm.passes.convert_sync import convert_sync
from batchnorm.statistics.sync import _all_gather
from batchnorm.training.workers import available_cores

_SIZE = 28  # pixels
_TURNS = 3
_CALLS = 20  # of a collective in a sample
# A convolution of these images takes about as long as what lies between two exchanges of Sync in a step.
_COMPUTED = (8, 32, _SIZE, _SIZE)


def network() -> BNInception:
    """What is trained: the paper's Inception at a quarter of its width, for ten classes of small grey images."""
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
            partial(_together, count, shape, 1 if options.quick else _TURNS),
            Processes(count=count, cores=cores),
        )
        for count in ((1, 2) if options.quick else (1, 2, 4))
    ]


@contextmanager
def _together(count: int, shape: tuple[int, ...], turns: int) -> Iterator[Contest]:
    contest = Contest(1)
    if count > (cores := available_cores()):
        contest.notes.append(
            f"{count} ranks share {cores} cores, so that each waits for the others to have theirs"
        )
    with Ranks(count, partial(contenders, shape), turns) as ranks:
        contest.contenders |= {name: partial(ranks, name) for name in ("ours", "plain", *BARE)}
        yield contest


def contenders(shape: tuple[int, ...]) -> Mapping[str, Contender]:
    """Of one rank, which has a batch of that shape."""
    torch.manual_seed(dist.get_rank())
    x = torch.randn(shape)
    model = network()
    models = {"ours": convert_sync(deepcopy(model))[0], "plain": model}
    found = {
        name: timed("step", networks.step(DistributedDataParallel(each), x), 1)
        for name, each in models.items()
    }
    found |= {name: partial(_alone, collective) for name, collective in BARE.items()}
    return {name: partial(_together_from_the_start, contender) for name, contender in found.items()}


def _together_from_the_start(contender: Contender) -> Sample:
    """A sample that has not begun to wait for a rank that was still busy with the one before."""
    dist.barrier()
    return contender()


def _alone(collective: Collective) -> Sample:
    """The time of a collective when there is computation between one and the next, as there is in a step.

    Back to back they would be faster: nobody would sleep while others compute, and have to be woken.
    """
    own = torch.zeros(collective.bytes // torch.float64.itemsize, dtype=torch.float64)
    all_ = own.new_empty(dist.get_world_size() * own.numel())
    images, weight = torch.randn(_COMPUTED), torch.randn(_COMPUTED[1], _COMPUTED[1], 3, 3)
    seconds = 0.0
    for _ in range(_CALLS):
        torch.conv2d(images, weight, padding=1)
        start = time.perf_counter()
        if collective.name == "all_gather":
            _all_gather(all_, own)
        else:
            dist.all_reduce(own)
        seconds += time.perf_counter() - start
    return {"step": seconds / _CALLS}
