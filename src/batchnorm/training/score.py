"""Top-1 and top-5 accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_FIVE = 5


@dataclass(frozen=True)
class Score:
    """Counts over `images` images: `top1` are right by the likeliest class, `top5` within the five likeliest."""

    images: int = 0
    top1: int = 0
    top5: int = 0

    @classmethod
    def of(cls, probabilities: Tensor, labels: Tensor) -> Score:
        """The score of probabilities (or logits), (N, classes), for labels, (N,)."""
        likeliest = probabilities.topk(min(_FIVE, probabilities.size(1)), 1).indices
        right = likeliest == labels[:, None]
        return cls(len(labels), int(right[:, 0].sum()), int(right.sum()))

    def __add__(self, other: Score) -> Score:
        """The score over both sets of images."""
        return Score(self.images + other.images, self.top1 + other.top1, self.top5 + other.top5)

    @property
    def accuracy(self) -> float:
        """The share of images whose class is the likeliest."""
        return self.top1 / self.images

    @property
    def accuracy_top5(self) -> float:
        """The share of images whose class is among the five likeliest."""
        return self.top5 / self.images


@torch.inference_mode()
def probabilities(network: nn.Module, images: Tensor) -> Tensor:
    """The probability of each class, (N, classes), of images (N, C, S, S)."""
    output: Tensor = network(images).softmax(1)
    return output
