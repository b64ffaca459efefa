"""torch.distributed.pipelining splits a model that torch.export captures."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from tests.passes.compare import unlike

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("statistics", [None, bn.Ghost(2), bn.Renorm(), bn.Population()], ids=repr)
def test_it_takes_our_layers(statistics, training):
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    layers = [bn.BatchNorm2d(4, statistics=statistics, activation="relu") for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layers[0], nn.Conv2d(4, 4, 1), layers[1], nn.Flatten())
    model = unlike(model).train(training)
    x = torch.randn(6, 3, 5, 5)
    split = {"2": pipelining.SplitPoint.BEGINNING}
    pipe = pipelining.pipeline(model, (x,), split_spec=split)
    assert pipe.num_stages == 2
    expected = copy.deepcopy(model)(x)  # the stages have the model's own buffers
    (output,) = pipe(x)
    assert_close(output, expected)
