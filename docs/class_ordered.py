"""Train on batches of a single class each, and print the table of docs/statistics.md, "Data that is not shuffled".

python docs/class_ordered.py        two minutes
"""

import platform
from collections.abc import Callable, Iterator
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.bench import table
from batchnorm.data.digits import Digits
from batchnorm.report.tables import Grid

RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
CHOOSING, PUBLISHED = range(2), range(2, 7)  # seeds: of the sweep of rates, and of the table
EPOCHS, BATCH, CLASSES = 8, 60, 10


def standardized(images: Tensor) -> Tensor:
    return images.float().flatten(1) / 255


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (28 * 28, 100):
        layers += [nn.Linear(inputs, 100, bias=False), bn.BatchNorm1d(100, activation="relu")]
    return nn.Sequential(*layers, nn.Linear(100, CLASSES))


def in_classes(labels: Tensor) -> Iterator[Tensor]:
    """The indices of batches of one class each, in random order."""
    shuffled = torch.randperm(len(labels))
    batches = [part for each in range(CLASSES) for part in shuffled[labels[shuffled] == each].split(BATCH)]
    return (batches[place] for place in torch.randperm(len(batches)).tolist() if len(batches[place]) > 1)


def in_no_order(labels: Tensor) -> Iterator[Tensor]:
    return iter(torch.randperm(len(labels)).split(BATCH))


def nothing(model: nn.Module, images: Tensor) -> None:
    """Train as it is."""


def renorm(model: nn.Module, images: Tensor) -> None:
    bn.configure(model, statistics=bn.Renorm(rmax=3.0, dmax=5.0))


def freeze_shuffled(model: nn.Module, images: Tensor) -> None:
    bn.adapt(model, images[torch.randperm(len(images))[:2000]].split(500))
    bn.freeze(model)


Order = Callable[[Tensor], Iterator[Tensor]]
Preparation = Callable[[nn.Module, Tensor], None]
WAYS: dict[str, tuple[Order, Preparation]] = {
    "batches of one class, as they come": (in_classes, nothing),
    "batches of one class, `statistics=bn.Renorm(3, 5)`": (in_classes, renorm),
    "batches of one class, statistics measured on shuffled data (`bn.adapt`), then `bn.freeze`": (
        in_classes,
        freeze_shuffled,
    ),
    "shuffled batches, as they come": (in_no_order, nothing),
}


def accuracy(digits: Digits, way: str, rate: float, seed: int, epochs: int = EPOCHS) -> float:
    """On the test images, in evaluation; that of chance where training diverges."""
    torch.manual_seed(seed)
    order, prepare = WAYS[way]
    model, images, labels = network(), standardized(digits.train_images), digits.train_labels.long()
    prepare(model, images)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for _ in range(epochs):
        for batch in order(labels):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        found = model.eval()(standardized(digits.test_images)).argmax(1)
    return float((found == digits.test_labels).float().mean())


def main() -> None:
    """Print the table: each way at the rate that is best for it on other seeds."""
    torch.set_num_threads(1)
    digits = Digits.load()
    rows = []
    for way in WAYS:
        rate = max(RATES, key=lambda rate: mean(accuracy(digits, way, rate, seed) for seed in CHOOSING))
        found = [accuracy(digits, way, rate, seed) for seed in PUBLISHED]
        rows.append([way, f"{rate}", f"{mean(found):.3f}", f"{min(found):.3f}–{max(found):.3f}"])
    print(
        table.markdown(
            Grid("Accuracy on the test images", ["training", "rate", "test accuracy", "five seeds"], rows)
        )
    )
    print(f"\ntorch {torch.__version__}, Python {platform.python_version()}, one thread")


if __name__ == "__main__":
    main()
