"""The layers beside torch's, and every setting of their constructors."""

import pytest
from torch import nn

import batchnorm as bn

each_layer = pytest.mark.parametrize(
    ("ours", "torch_s", "shape"),
    [
        pytest.param(bn.BatchNorm1d, nn.BatchNorm1d, (6, 3), id="1d (N, C)"),
        pytest.param(bn.BatchNorm1d, nn.BatchNorm1d, (6, 3, 4), id="1d (N, C, L)"),
        pytest.param(bn.BatchNorm2d, nn.BatchNorm2d, (6, 3, 2, 4), id="2d"),
        pytest.param(bn.BatchNorm3d, nn.BatchNorm3d, (6, 3, 2, 2, 3), id="3d"),
    ],
)
each_setting = pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.7, "eps": 0.3},
    ],
    ids=str,
)
