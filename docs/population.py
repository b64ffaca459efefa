"""Population statistics by our pass, torch's, fvcore's and timm's, against those of all data in float64.

python docs/population.py measure    rows of docs/measured/population.jsonl; fvcore is left out where it is missing
python docs/population.py            print the tables of docs/population.md
"""

import copy
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.optim.swa_utils import update_bn

import batchnorm as bn
from batchnorm.data.digits import Digits

ROWS = Path(__file__).parent / "measured" / "population.jsonl"
BATCH = 96  # so that the last one has 32 of 8,000 images
ORDERS = ("shuffled", "sorted by class")


def network():
    """A network that has been trained for some steps, so that its layers are no longer alike; with dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(1152, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    x, labels = images("shuffled")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(150):
        chosen = slice(step * 32 % 7_900, step * 32 % 7_900 + 32)
        loss = nn.functional.cross_entropy(model.train()(x[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def images(order):
    digits = Digits.load()
    x, labels = (digits.train_images[:, None].float() / 255 - 0.1307) / 0.3081, digits.train_labels.long()
    if order == "shuffled":
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    else:
        chosen = labels.argsort(stable=True)
    return x[chosen], labels[chosen]


def exact(model, x):
    """The statistics of each layer's input in inference, of all data, in float64."""
    model, x = copy.deepcopy(model).double().eval(), x.double()
    found = {}
    for name, layer in model.named_children():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            dims = [each for each in range(x.dim()) if each != 1]
            found[name] = x.mean(dims), x.var(dims)
            layer.running_mean.copy_(found[name][0])
            layer.running_var.copy_(found[name][1])
        with torch.no_grad():
            x = layer(x)
    return found


def errors(model, expected):
    """Of each layer: of the mean in standard deviations, of the variance relative; root mean square over channels."""
    found = []
    for name, (mean, variance) in expected.items():
        layer = model.get_submodule(name)
        of_mean = (layer.running_mean.double() - mean) / variance.sqrt()
        of_variance = layer.running_var.double() / variance - 1
        found.append([each.square().mean().sqrt().item() for each in (of_mean, of_variance)])
    return found


def by_torch(model, batches):
    update_bn(batches, model)


def by_fvcore(model, batches):
    from fvcore.nn.precise_bn import update_bn_stats

    update_bn_stats(model.train(), batches, num_iters=len(batches), progress=None)


def ours(**options):
    return lambda model, batches: bn.population(model, batches, **options)


METHODS = {
    "`bn.population`": ours(),
    '`bn.population`, `estimator="pooled"`': ours(estimator="pooled"),
    '`bn.population`, `"pooled"`, `sequential=True`': ours(estimator="pooled", sequential=True),
    "`torch.optim.swa_utils.update_bn`": by_torch,
    "fvcore `update_bn_stats`": by_fvcore,
}


def over_ranks(rank, ranks, store, out):
    """Each rank has a part of the data, sorted by class; the first is twice as large as the others."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    from timm.utils import distribute_bn

    model = network()
    x, _ = images("sorted by class")
    part = len(x) // (ranks + 1)
    own = (
        x[: 2 * part] if rank == 0 else x[(rank + 1) * part : (rank + 2) * part if rank < ranks - 1 else None]
    )
    batches = own.split(BATCH)
    expected = exact(model, x)
    found = {}
    for name, method in {
        '`bn.population`, `"pooled"`, `sequential=True`': ours(estimator="pooled", sequential=True),
        "`update_bn` on each rank, the first one's kept (DistributedDataParallel)": by_torch,
        "`update_bn` on each rank, then timm's `distribute_bn(reduce=True)`": by_torch,
        "`update_bn` on each rank, then `bn.reduce_statistics`": by_torch,
    }.items():
        measured = copy.deepcopy(model)
        method(measured, batches)
        if "timm" in name:
            distribute_bn(measured, ranks, reduce=True)
        if "reduce_statistics" in name:
            bn.reduce_statistics(measured, count=float(len(own)))
        found[name] = errors(measured, expected)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def measure():
    model = network()
    found = []
    for order in ORDERS:
        x, _ = images(order)
        expected = exact(model, x)
        for name, method in METHODS.items():
            measured = copy.deepcopy(model)
            torch.manual_seed(0)
            try:
                method(measured, x.split(BATCH))
            except ImportError as why:
                print(f"{name}: {why}", file=sys.stderr)
                continue
            found.append({"ranks": 1, "order": order, "method": name, "errors": errors(measured, expected)})
    for ranks in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(over_ranks, (ranks, f"{folder}/store", f"{folder}/out"), nprocs=ranks)
            for name, each in json.loads(Path(folder, "out").read_text()).items():
                found.append({"ranks": ranks, "order": "sorted by class", "method": name, "errors": each})
    ROWS.write_text("".join(json.dumps(each) + "\n" for each in found))


def rows():
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def number(value):
    if not math.isfinite(value):
        return str(value)
    return f"{value:.1e}" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def table(ranks):
    some = [row for row in rows() if row["ranks"] in ranks]
    columns = list(dict.fromkeys((row["ranks"], row["order"]) for row in some))
    titles = [order if len(ranks) == 1 else f"{number} ranks" for number, order in columns]
    lines = [
        "| | " + " | ".join(f"{title}: mean | variance" for title in titles) + " |",
        "|---|" + "--:|" * (2 * len(columns)),
    ]
    for method in dict.fromkeys(row["method"] for row in some):
        cells = []
        for column in columns:
            (row,) = (r for r in some if (r["ranks"], r["order"]) == column and r["method"] == method)
            cells += [number(max(layer[part] for layer in row["errors"])) for part in (0, 1)]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    else:
        print(table([1]), table([2, 3]), sep="\n\n")
