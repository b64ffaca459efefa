"""The names of data sets. Does not import torch, so that the command line can list them."""

from __future__ import annotations

SHIPPED = "mnist-10k"  # in this package
DIGITS = (SHIPPED, "mnist", "fashion-mnist")
CIFAR_10 = "cifar-10"
NAMES = (*DIGITS, CIFAR_10)
# The classes of Fashion-MNIST, in the order of their numbers.
FASHION = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
