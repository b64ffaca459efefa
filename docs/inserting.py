"""Train networks at 1, 5 and 30 times their best learning rate, with and without `bn.insert`; write docs/inserting.md.

python docs/inserting.py measure NAME ...    these networks: rows of docs/measured/inserting.jsonl
python docs/inserting.py measure             all that have none yet; two hours on a core
python docs/inserting.py                     write the page
"""

import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.data.digits import Digits

DOCS = Path(__file__).parent
ROWS = DOCS / "measured" / "inserting.jsonl"
STEPS, BATCH, LAST = 200, 16, 50
SEARCH = 100  # steps, for the best rate
GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
TIMES = (1, 5, 30)
SEEDS = (0, 1, 2)

PAGE = """# Training at 5 and 30 times the best rate

This page is written by `docs/inserting.py` from rows that `python docs/inserting.py measure` has written: {networks}
networks without batch normalization, trained on the digits of `mnist-10k` as they are and after `bn.insert`, for
{steps} steps of SGD with momentum 0.9 and batches of {batch}, over {seeds} seeds. The best rate is the one of
{grid} with which the network as it is has the smallest loss in the last {last} of {search} steps (seed 0). {machine}

A training diverges when its loss is no longer finite, and is stuck when the loss of the last {last} steps is no better
than that of a constant output (within 5 %). Behind the number of seeds that train, in brackets where not all do, is
the median over the seeds of the loss of the last {last} steps.

| network | best rate | as it is, ×1 | ×5 | ×30 | inserted, ×1 | ×5 | ×30 |
|---|--:|--:|--:|--:|--:|--:|--:|
{rows}

{total}

The networks are torchvision's and timm's with 10 classes, and for inputs of 32 or 64 pixels classifiers of 512 units
behind an average over all positions. GoogLeNet's own layers are taken out first. The U-Net learns which pixels of a
noisy digit are ink (binary cross entropy), the encoder–decoder to make the digit again from 32 numbers (squared error);
all others classify.

What stays: the last layer, which is not normalised, sets a limit to the rate, at 1.5 and 9 for the encoder–decoder's;
in batches of 16 the moments of VGG's last maps of one pixel are noisy; and 200 steps are few for AlexNet, SqueezeNet
and VGG, which as they are hardly leave the constant output at any rate.
"""


def narrow(model, features):
    """With a classifier for small images."""
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    for index, layer in enumerate(model.classifier):
        if isinstance(layer, nn.Linear):
            outputs = 10 if layer.out_features == 10 else 512
            model.classifier[index] = nn.Linear(features, outputs)
            features = 512
    return model


def googlenet():
    from torchvision.models import googlenet

    model = googlenet(num_classes=10, aux_logits=False, init_weights=False)
    for module in list(model.modules()):
        if hasattr(module, "bn"):
            module.bn = nn.Identity()
            module.conv.bias = nn.Parameter(torch.zeros(module.conv.out_channels))
    for module in model.modules():  # truncated_normal(0.01), torchvision's, is for a network with its layers
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class UNet(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.down = nn.ModuleList([Block(3, width), Block(width, 2 * width), Block(2 * width, 4 * width)])
        self.up = nn.ModuleList([Block(6 * width, 2 * width), Block(3 * width, width)])
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        kept = []
        for block in self.down:
            x = block(x if not kept else F.max_pool2d(x, 2))
            kept.append(x)
        for block, skip in zip(self.up, reversed(kept[:-1]), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return self.head(x)


def autoencoder():
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(2048, 32), nn.ReLU(), nn.Linear(32, 2048), nn.ReLU(), nn.Unflatten(1, (32, 8, 8)),
        nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1),
    )  # fmt: skip


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def torchvision_s(name, features):
    from torchvision import models

    return narrow(models.get_model(name, weights=None, num_classes=10), features)


def squeezenet():
    from torchvision import models

    return models.squeezenet1_1(num_classes=10)


def timm_s(name, **options):
    import timm

    return timm.create_model(name, num_classes=10, **options)


# how each is made, the size of its images, and its task
NETWORKS = {
    "MLP": (mlp, 32, "classes"),
    "AlexNet": (lambda: torchvision_s("alexnet", 256), 64, "classes"),
    "VGG-11": (lambda: torchvision_s("vgg11", 512), 32, "classes"),
    "VGG-16": (lambda: torchvision_s("vgg16", 512), 32, "classes"),
    "SqueezeNet": (squeezenet, 64, "classes"),
    "GoogLeNet": (googlenet, 64, "classes"),
    "U-Net": (UNet, 32, "ink"),
    "encoder–decoder": (autoencoder, 32, "image"),
    "timm/nf_resnet26": (lambda: timm_s("nf_resnet26"), 32, "classes"),
    "timm/resmlp_12_224": (lambda: timm_s("resmlp_12_224", img_size=32), 32, "classes"),
}


class Batches:
    """Digits, enlarged to a size, in an order of a seed."""

    def __init__(self, size, task, seed):
        digits = Digits.load()
        self.images, self.labels = digits.train_images, digits.train_labels.long()
        self.size, self.task = size, task
        self.generator = torch.Generator().manual_seed(seed)

    def next(self):
        """What the network is given, what it is to return, and the loss of the two."""
        chosen = torch.randint(len(self.images), (BATCH,), generator=self.generator)
        images = self.images[chosen, None].float() / 255
        images = F.interpolate(images, size=self.size, mode="bilinear", antialias=True)
        inputs = (images - 0.1307) / 0.3081
        if self.task == "classes":
            return inputs.expand(-1, 3, -1, -1).contiguous(), self.labels[chosen], F.cross_entropy
        if self.task == "ink":
            noisy = inputs + torch.randn(inputs.shape, generator=self.generator)
            wanted = (images > 0.5).float()
            return noisy.expand(-1, 3, -1, -1).contiguous(), wanted, F.binary_cross_entropy_with_logits
        return inputs.expand(-1, 3, -1, -1).contiguous(), images, F.mse_loss

    def constant_loss(self):
        """The loss of the best constant output."""
        if self.task == "classes":
            return math.log(10)
        wanted = torch.cat([self.next()[1] for _ in range(10)])
        mean = wanted.mean().item()
        if self.task == "ink":
            return -mean * math.log(mean) - (1 - mean) * math.log(1 - mean)
        return wanted.var().item()


def train(make, size, task, rate, seed, inserted, steps=STEPS):
    """The loss of the last steps; nan where it was not finite."""
    torch.manual_seed(seed)
    model, batches = make(), Batches(size, task, seed)
    if inserted:
        model, _ = bn.insert(model, batches.next()[0])
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    losses = []
    for _ in range(steps):
        inputs, wanted, loss_of = batches.next()
        loss = loss_of(model.train()(inputs), wanted)
        if not loss.isfinite():
            return math.nan
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return statistics.fmean(losses[-LAST:])


def measure(name):
    make, size, task = NETWORKS[name]
    start = time.perf_counter()
    of_rate = {rate: train(make, size, task, rate, 0, False, SEARCH) for rate in GRID}
    best = min((rate for rate in GRID if of_rate[rate] == of_rate[rate]), key=of_rate.get)
    runs = [
        {
            "inserted": inserted,
            "times": times,
            "seed": seed,
            "loss": train(make, size, task, best * times, seed, inserted),
        }
        for inserted in (False, True)
        for times in TIMES
        for seed in SEEDS
    ]
    constant = Batches(size, task, 0).constant_loss()
    return {
        "name": name,
        "best": best,
        "rates": of_rate,
        "constant": constant,
        "runs": runs,
        "seconds": round(time.perf_counter() - start),
    }


def rows():
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def trains(row, run):
    return run["loss"] < 0.95 * row["constant"]  # not of nan


def cell(row, inserted, times):
    runs = [run for run in row["runs"] if run["inserted"] == inserted and run["times"] == times]
    losses = [run["loss"] for run in runs if trains(row, run)]
    if not losses:
        diverged = sum(run["loss"] != run["loss"] for run in runs)
        return "diverges" if diverged == len(runs) else "stuck" if not diverged else "diverges or is stuck"
    number = "" if len(losses) == len(runs) else f" ({len(losses)} of {len(runs)})"
    return f"{statistics.median(losses):.3f}{number}"


def page():
    found = {row["name"]: row for row in rows()}
    every = [found[name] for name in NETWORKS if name in found]
    counts = []
    for inserted, title in ((False, "as they are"), (True, "inserted")):
        for times in TIMES[1:]:
            runs = [
                (row, run)
                for row in every
                for run in row["runs"]
                if run["inserted"] == inserted and run["times"] == times
            ]
            counts.append(f"{title}, ×{times}: {sum(trains(*each) for each in runs)} of {len(runs)}")
    return PAGE.format(
        networks=len(every),
        steps=STEPS,
        search=SEARCH,
        batch=BATCH,
        last=LAST,
        seeds=len(SEEDS),
        grid=", ".join(f"{rate:g}" for rate in GRID),
        machine=every[0]["machine"],
        rows="\n".join(
            f"| {row['name']} | {row['best']:g} | "
            + " | ".join(cell(row, inserted, times) for inserted in (False, True) for times in TIMES)
            + " |"
            for row in every
        ),
        total="Trainings that train: " + "; ".join(counts) + ".",
    )


def main(arguments):
    if arguments[:1] != ["measure"]:
        (DOCS / "inserting.md").write_text(page())
        return
    torch.set_num_threads(1)
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__.partition('+')[0]}."
    known = {row["name"] for row in rows()}
    for name in arguments[1:] or NETWORKS:
        if name in known and not arguments[1:]:
            continue
        row = measure(name) | {"machine": machine}
        others = [each for each in rows() if each["name"] != name]
        ROWS.write_text("".join(json.dumps(each) + "\n" for each in [*others, row]))
        print(f"{name}: best rate {row['best']:g}, {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
