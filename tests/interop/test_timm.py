"""timm's networks: with ours in place of torch's layers, and with the tools that timm has for its own."""

import pytest

from tests.kernels.processes import said

pytest.importorskip("timm")
pytestmark = pytest.mark.slow

NETWORKS = ["resnet18", "mobilenetv3_small_050"]
IN_PLACE_OF_TORCH_S = """
import copy, warnings
import torch
import batchnorm as bn
warnings.simplefilter("ignore")
for kind in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
    setattr(torch.nn, kind, getattr(bn, kind))
import timm
from tests.passes.compare import near, unlike

theirs = unlike(timm.create_model("{name}", num_classes=4)).double()
ours, report = bn.upgrade(copy.deepcopy(theirs))
assert len(report.layers) > 10
x = torch.randn(2, 3, 96, 96).double()
for training in (False, True):
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        outputs.append(model.train(training)(x))
    near(*outputs)
print("the same")
"""


@pytest.mark.parametrize("name", NETWORKS)
def test_with_ours_in_place_of_torch_s_before_timm_is_imported(name):
    assert said(IN_PLACE_OF_TORCH_S.format(name=name)) == "the same"
