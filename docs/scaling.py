"""Write docs/scaling.md: its numbers are counted by batchnorm/bench/traffic.py, or were measured by `batchnorm bench`.

python docs/scaling.py
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet50

import batchnorm as bn
from batchnorm.bench import table, traffic
from batchnorm.bench.rows import read
from batchnorm.bench.traffic import Collective
from batchnorm.graph.modules import layers_of
from batchnorm.models.inception import BNInception
from batchnorm.report.tables import Grid

DOCS = Path(__file__).parent
MEASURED = DOCS.parent / "benchmarks" / "scaling.json"
RANKS = (1, 8, 64, 1024)

PAGE = """# Scaling: the cost of batch normalization over many processes

This page is written by `docs/scaling.py`. Bytes and collectives are counted by `batchnorm/bench/traffic.py`, which
`tests/bench/test_traffic.py` compares with the collectives of 2 and 3 real processes.

## Bytes and collectives of a step

A rank trains with DistributedDataParallel (DDP), which by default all-reduces the gradients and broadcasts the
buffers of rank 0. Batch normalization adds only its buffers to that, unless its layers have
`statistics=bn.Sync()`: then each layer gathers count, mean and m2 in the forward pass and sums 2·C numbers in the
backward pass, all in float64 ([Sync](statistics.md)). MB are 10⁶ bytes that a rank receives:

    all_gather    (p - 1)·n          n bytes of each of p ranks, in a ring
    all_reduce    2·(p - 1)/p·n      in a ring
    broadcast     n

{tables}

**Sync is dominated by latency.** Its {exchanges} collectives (BN-Inception) are sequential and blocking; the
{gradients} all_reduces of gradients overlap with the backward pass.

**Over very many ranks bandwidth matters too.** The bytes of all_gather grow with p, those of all_reduce do not: from
{crossing} ranks on (ResNet-50: {resnet_crossing}) a rank receives more for Sync than for its gradients. In groups of
8, the cost of Sync is that of 8 ranks, for any number of groups.

**Buffers need not be broadcast.** With Sync over all ranks they are equal anyway, and
`DistributedDataParallel(model, broadcast_buffers=False)` saves the broadcasts. A network in
evaluation mode exchanges nothing.

**Population statistics take one all_gather**, in `batchnorm train` at each evaluation. Every
rank computes the moments of its own batches (algorithm 2 of the paper), and to merge them each receives {population} MB
(BN-Inception) or {resnet_population} MB (ResNet-50) from every other rank. With Sync a batch is that of all ranks, and
its moments are merged batch by batch instead.

## When to synchronise

- **With 16 to 32 images per rank or more: no.** Goyal et al. (2017), "Accurate, Large Minibatch SGD", section 2.3: 256
  GPUs with 32 images each use the statistics of their own images. The number 32 is part of the loss function; with
  statistics over all images of the step, the loss would depend on the number of GPUs. Wu & Johnson (2021), "Rethinking
  'Batch' in BatchNorm", section 4 (normalization batch size): all else equal, moments of some tens of samples
  generalise best. Moments of fewer samples are too noisy; those of very many lack the noise, which regularises.
- **With fewer, as in detection and segmentation: yes.** Peng et al. (2018), "MegDet", trains a detector with two
  images per GPU this way.
- **With fewer, over hundreds of ranks: in groups** of 16 to 32 images.

Create the groups in every process, before wrapping the model in DDP:

```python
import torch.distributed as dist
import batchnorm as bn


def synchronised(model, size):
    \"\"\"BN by the samples of `size` neighbouring ranks: 0 to size - 1, size to 2·size - 1, and so on.\"\"\"
    group, _ = dist.new_subgroups(size)
    return bn.convert_sync(model, group)[0]
```

Under torchrun the ranks of a machine are consecutive, so groups of the size of a machine do not use the network. Each
group has its own running statistics; DDP's broadcast replaces all of them by those of rank 0.

## Measured

```bash
batchnorm bench scaling
```

It measures a training step (SGD) of BN-Inception of quarter width at 28 pixels with 32 images per rank, in 1, 2 and 4
processes of one thread each in a gloo group; steps without Sync, with Sync, and single collectives are interleaved. The
time that Sync adds is predicted from the collectives:

    added = Σ over Sync's collectives of (latency(p) + bytes that a rank receives / bandwidth(p))

Latency and bandwidth are those of an all_gather or all_reduce of 8 bytes and of 1 MiB, each after a millisecond of
computation, as in a step: back to back they take a half or a third of that time, since no rank sleeps and is woken. The
prediction includes neither load imbalance between ranks nor the additional passes over memory.

{measured}

## Over several machines

Run the same command on each machine, here 4 machines with 8 processes each; HOST is one of them:

```
torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
    -m batchnorm.cli train run.toml --out /shared/runs/NAME
```

`batch_size` in run.toml counts the images of a step over all processes, and Sync is off unless asked for:

```
[training]
batch_size = 1024
sync = true
```
"""


def inception() -> nn.Module:
    return BNInception()


def resnet() -> nn.Module:
    model: nn.Module = bn.convert_sync(resnet50())[0]
    return model


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def megabytes(value: float) -> str:
    """To three digits, the last of them too when it is 0."""
    return f"{value / 1e6:#.3g}".removesuffix(".") if value else "0"


def grid(name: str, model: nn.Module) -> Grid:
    """A line for each number of ranks: how many collectives, and MB that a rank receives."""
    layers = layers_of(model).values()
    channels = sum(layer.num_features for layer in layers)
    kinds = {"Sync": traffic.exchanges, "gradients": traffic.gradients, "buffers": traffic.buffers}
    rows = []
    for ranks in RANKS:
        cells = [f"{ranks:,}"]
        for collectives in (kind(model) for kind in kinds.values()):
            alone = ranks == 1  # DDP calls them all the same, and nothing moves
            cells += [
                str(0 if alone else len(collectives)),
                megabytes(traffic.received_bytes(collectives, ranks)),
            ]
        rows.append(cells)
    columns = ["ranks", *(cell for kind in kinds for cell in (kind, "MB"))]
    return Grid(f"{name}: {len(layers)} BN layers, {channels:,} channels", columns, rows)


def crossing(model: nn.Module) -> int:
    """The number of ranks from which on Sync brings a rank more bytes than the gradients."""
    sync, gradients = traffic.exchanges(model), traffic.gradients(model)
    return next(p for p in count(2) if traffic.received_bytes(sync, p) > traffic.received_bytes(gradients, p))


def gathered(collectives: list[Collective]) -> str:
    """MB that a rank receives of so many all_gathers from each other rank."""
    return megabytes(sum(each.bytes for each in collectives))


def measured() -> str:
    """The tables of benchmarks/scaling.json, or that there are none."""
    if not MEASURED.exists():
        return "With `--out benchmarks` its tables come to [RESULTS.md](../benchmarks/RESULTS.md), and here."
    results = read(MEASURED)
    tables = [table.markdown(each) for each in table.grids(results)]
    return "\n\n".join([f"{results.machine}; milliseconds.", *tables, *results.notes, table.SCALING])


def page() -> str:
    """The page."""
    models = {"BN-Inception": built(inception), "ResNet-50": built(resnet)}
    one, other = models.values()
    return PAGE.format(
        tables="\n\n".join(table.markdown(grid(name, model)) for name, model in models.items()),
        exchanges=len(traffic.exchanges(one)),
        gradients=len(traffic.gradients(one)),
        crossing=crossing(one),
        resnet_crossing=crossing(other),
        population=gathered(traffic.population(one)),
        resnet_population=gathered(traffic.population(other)),
        measured=measured(),
    )


if __name__ == "__main__":
    (DOCS / "scaling.md").write_text(page(), encoding="utf-8")
