"""Networks into which bugs are planted: one written by hand, one of torchvision, one of timm; healthy at first."""

import timm
import torch
from torch import nn
from torchvision import models

import batchnorm as bn
from batchnorm.diagnostics.check import Case


class Own(nn.Module):
    """With layers in a list, and a branch that is added."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + torch.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


# what makes it, the layer at which bugs are planted, the convolution before it
NETWORKS = {
    "own": (Own, "norms.1", "convs.1"),
    "torchvision": (lambda: models.resnet18(num_classes=4), "layer2.0.bn1", "layer2.0.conv1"),
    "timm": (
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=4),
        "blocks.2.0.bn2",
        "blocks.2.0.conv_dw",
    ),
}


def batches(number=4, examples=16, size=64):
    return [torch.randn(examples, 3, size, size) for _ in range(number)]


def healthy(make):
    """A fresh network in training mode with measured statistics, the batches, and an optimizer that fits."""
    torch.manual_seed(0)
    model = make()
    data = batches()
    bn.population(model, data)
    return model.train(), data, torch.optim.SGD(bn.param_groups(model, 1e-4), lr=0.1)


def case(name):
    make, path, before = NETWORKS[name]
    model, data, optimizer = healthy(make)
    return Case(model, path, before, data, optimizer)
