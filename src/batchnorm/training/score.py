"""How many images a network classifies correctly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_FIVE = 5


@dataclass(frozen=True)
class Score:
    """Of `images` images the class is the likeliest of `first`, and among the five likeliest of `among_five`."""

    images: int = 0
    first: int = 0
    among_five: int = 0

    @classmethod
    def of(cls, probabilities: Tensor, labels: Tensor) -> Score:
        """Of probabilities (or logits), (N, classes), and labels, (N,)."""
        likeliest = probabilities.topk(min(_FIVE, probabilities.size(1)), 1).indices
        right = likeliest == labels[:, None]
        return cls(len(labels), int(right[:, 0].sum()), int(right.sum()))

    def __add__(self, other: Score) -> Score:
        """Of both sets of images."""
        return Score(self.images + other.images, self.first + other.first, self.among_five + other.among_five)

    @property
    def accuracy(self) -> float:
        """The share of images whose class is the likeliest."""
        return self.first / self.images

    @property
    def accuracy_top5(self) -> float:
        """The share of images whose class is among the five likeliest."""
        return self.among_five / self.images


@torch.inference_mode()
def probabilities(network: nn.Module, images: Tensor) -> Tensor:
    """The probability of each class, (N, classes), of images (N, C, S, S)."""
    of_classes: Tensor = network(images).softmax(1)
    return of_classes
