"""Train a network with an L1 penalty on γ, prune it by γ with Torch-Pruning, measure and fold it; needs torch-pruning.

python docs/pruning.py measure    rows of docs/measured/pruning.jsonl; two minutes on a core
python docs/pruning.py            print the table of docs/pruning.md
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

import batchnorm as bn
from batchnorm.data.digits import Digits

ROWS = Path(__file__).parent / "measured" / "pruning.jsonl"
EPOCHS, BATCH, TUNING = 8, 64, 1
PENALTY = 1e-2
SHARES = (0.0, 0.5, 0.7, 0.8)


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


def network():
    return nn.Sequential(
        Block(1, 32), Block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


def data():
    digits = Digits.load()
    scaled = [
        (each[:, None].float() / 255 - 0.1307) / 0.3081 for each in (digits.train_images, digits.test_images)
    ]
    return scaled[0], digits.train_labels.long(), scaled[1], digits.test_labels.long()


def train(model, epochs, rate, penalty):
    """SGD with a cosine; the gradient of penalty · Σ|γ| is added to that of each γ."""
    x, labels, _, _ = data()
    groups = bn.param_groups(model, weight_decay=1e-4, scales=0.0)
    scales = next(group["params"] for group in groups if group["name"] == "scales")
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for chosen in order[: len(x) // BATCH * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(model.train()(x[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            for scale in scales:
                scale.grad.add_(scale.detach().sign(), alpha=penalty)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model):
    _, _, x, labels = data()
    return (model.eval()(x).argmax(1) == labels).double().mean().item()


def prune(model, share):
    """Without this share of the channels, those with the smallest γ of each group that depends on each other."""
    import torch_pruning as tp

    tp.pruner.BNScalePruner(
        model,
        torch.zeros(1, 1, 28, 28),
        importance=tp.importance.BNScaleImportance(),
        pruning_ratio=share,
        global_pruning=True,
        ignored_layers=[model[-1]],
    ).step()


def size(model):
    return sum(each.numel() for each in model.parameters())


def measure():
    torch.set_num_threads(1)
    found = []
    for penalty in (0.0, PENALTY):
        torch.manual_seed(0)
        trained = network()
        train(trained, EPOCHS, 0.1, penalty)
        for share in SHARES:
            model = copy.deepcopy(trained)
            row = {"penalty": penalty, "share": share}
            if share:
                prune(model, share)
            row["pruned"] = accuracy(model)
            bn.population(model, data()[0].split(256))
            row["measured"] = accuracy(model)
            if share:
                train(model, TUNING, 0.02, penalty)
                row["tuned"] = accuracy(model)
            folded, report = bn.fold(model.eval(), data()[2][:8])
            row |= {"folded": accuracy(folded), "layers": report.count("folded"), "parameters": size(folded)}
            found.append(row)
            print(row, flush=True)
    ROWS.write_text("".join(json.dumps(each) + "\n" for each in found))


def table():
    lines = [
        "| penalty | channels pruned | parameters, folded | accuracy, pruned | statistics measured | tuned, folded |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for line in ROWS.read_text().splitlines():
        row = json.loads(line)
        lines.append(
            f"| {row['penalty']:g} | {row['share']:.0%} | {row['parameters']:,} | {row['pruned']:.1%} "
            f"| {row['measured']:.1%} | {row['folded']:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    else:
        print(table())
