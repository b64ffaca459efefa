"""Every model of torchvision that classifies and has batch normalization, before and after an upgrade."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from tests.passes.compare import beside, same

models = pytest.importorskip("torchvision").models
pytestmark = pytest.mark.slow

# layers, fused
COUNTS = {
    "densenet121": (121, 121),
    "efficientnet_b0": (49, 33),
    "googlenet": (59, 59),
    "inception_v3": (94, 94),
    "maxvit_t": (7, 0),  # GELU
    "mnasnet0_5": (52, 35),
    "mobilenet_v2": (52, 35),
    "mobilenet_v3_large": (46, 11),  # the others are hardswish
    "mobilenet_v3_small": (34, 5),
    "regnet_x_400mf": (71, 67),
    "regnet_y_400mf": (53, 49),
    "resnet18": (20, 17),
    "resnet50": (53, 49),
    "resnext50_32x4d": (53, 49),
    "shufflenet_v2_x0_5": (56, 37),
    "vgg11_bn": (8, 8),
}
REASONS = (
    "is the residual of another layer",
    "no activation follows",
    "Hardswish has no fused kernel",
    "GELU has no fused kernel",
)


def make(name):
    """Small where its code has a say in that."""
    options = {"num_classes": 4}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # scipy's, and slow
    if name == "inception_v3":
        options["aux_logits"] = False  # it needs 299 × 299
    if name == "maxvit_t":
        return models.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 8, 0.2, num_classes=4)
    model = models.get_model(name, weights=None, **options)
    if name == "vgg11_bn":
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 4)
    return model


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_trains_and_evaluates_as_before(name):
    theirs, ours, report = beside(make(name).double())
    assert (len(report.layers), report.count("fused")) == COUNTS[name]
    side = 75 if name == "inception_v3" else 32 if name == "maxvit_t" else 64
    same(ours, theirs, torch.randn(2, 3, side, side).double())


# regnet computes its widths with tensors, which on meta have no values
ON_META = [name for name in models.list_models(module=models) if not name.startswith("regnet")]


@pytest.mark.parametrize("name", ON_META)
def test_every_layer_is_understood(name):
    with torch.device("meta"):
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=None, **options)
    number = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    _, report = bn.upgrade(model)
    assert len(report.layers) == number and report.count("left alone") == 0
    for layer in report.layers:
        assert layer.outcome == "fused" or layer.why.startswith(REASONS)
