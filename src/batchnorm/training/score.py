"""Top-1 and top-5 accuracy."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_FIVE = 5
_CONFUSED_CLASSES = 100  # with more, which wrong class it was is not recorded
_OTHER = -1


@dataclass(frozen=True)
class Score:
    """Counts over `images` images: `top1` are right by the likeliest class, `top5` within the five likeliest.

    loss_sum: of the cross-entropies, nats.
    confusion: numbers of images by their class and the likeliest class.
    """

    images: int = 0
    top1: int = 0
    top5: int = 0
    loss_sum: float = field(default=0.0, compare=False)
    confusion: Counter[tuple[int, int]] = field(default_factory=Counter, compare=False)

    @classmethod
    def of(cls, probabilities: Tensor, labels: Tensor) -> Score:
        """The score of probabilities, (N, classes), for labels, (N,)."""
        likeliest = probabilities.topk(min(_FIVE, probabilities.size(1)), 1).indices
        right = likeliest == labels[:, None]
        of_label = probabilities.gather(1, labels[:, None]).clamp_min(torch.finfo(probabilities.dtype).tiny)
        pairs = zip(labels.tolist(), likeliest[:, 0].tolist(), strict=True)
        return cls(
            len(labels),
            int(right[:, 0].sum()),
            int(right.sum()),
            loss_sum=-float(of_label.log().sum()),
            confusion=Counter(pairs),
        )

    def __add__(self, other: Score) -> Score:
        """The score over both sets of images."""
        return Score(
            self.images + other.images,
            self.top1 + other.top1,
            self.top5 + other.top5,
            self.loss_sum + other.loss_sum,
            self.confusion + other.confusion,
        )

    @property
    def accuracy(self) -> float:
        """The share of images whose class is the likeliest."""
        return self.top1 / self.images

    @property
    def loss(self) -> float:
        """The mean cross-entropy, nats."""
        return self.loss_sum / self.images

    def confused(self, classes: int) -> list[tuple[int, int, int]]:
        """(class, likeliest class, images), sorted; where there are many classes, -1 stands for all wrong ones."""
        counts = self.confusion
        if classes > _CONFUSED_CLASSES:
            counts = Counter()
            for (label, likeliest), images in self.confusion.items():
                counts[label, likeliest if likeliest == label else _OTHER] += images
        return [(*pair, images) for pair, images in sorted(counts.items())]

    @property
    def accuracy_top5(self) -> float:
        """The share of images whose class is among the five likeliest."""
        return self.top5 / self.images


@torch.inference_mode()
def probabilities(network: nn.Module, images: Tensor) -> Tensor:
    """The probability of each class, (N, classes), of images (N, C, S, S)."""
    output: Tensor = network(images).softmax(1)
    return output
