"""`bn.paused`: training mode, and running statistics that stay."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from tests.mutations.mutation import Mutation

X = torch.randn(8, 3, 4, 4) * 2 + 1


class ByTorch(nn.BatchNorm2d):
    def forward(self, x):
        parameters = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *parameters, self.training, self.momentum or 0.0, self.eps)


LAYERS = {
    "ours": lambda: bn.BatchNorm2d(3),
    "torch's": lambda: nn.BatchNorm2d(3),
    "somebody's": lambda: ByTorch(3),
    "cumulative": lambda: bn.BatchNorm2d(3, momentum=None),
    "Ghost": lambda: bn.BatchNorm2d(3, statistics=bn.Ghost(2)),
    "Renorm": lambda: bn.BatchNorm2d(3, statistics=bn.Renorm()),
    "Sync": lambda: bn.BatchNorm2d(3, statistics=bn.Sync()),
    "frozen": lambda: bn.BatchNorm2d(3, statistics=bn.Population()),
    "per activation": lambda: bn.BatchNorm((3, 4, 4)),
    "no statistics": lambda: bn.BatchNorm2d(3, track_running_stats=False),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_is_the_layer_s_and_nothing_moves(name, training):
    model = nn.Sequential(nn.Identity(), LAYERS[name]()).train(training)
    expected = copy.deepcopy(model)(X)
    state, attributes = copy.deepcopy(model.state_dict()), [{**vars(each)} for each in model.modules()]
    with bn.paused(model):
        for _ in range(2):
            x = X.clone().requires_grad_()
            y = model(x)
            y.sum().backward()
            assert_close(y, expected)
        assert list(model.state_dict()) == list(state)
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [vars(each) for each in model.modules()] == attributes
    assert_close(model(X), expected)
    if training and name not in ("frozen", "no statistics"):
        assert (model[1].running_mean != state["1.running_mean"]).any()  # and now it follows again


def test_contexts_nest_and_end_with_an_error():
    model = nn.Sequential(bn.BatchNorm2d(3), nn.BatchNorm2d(3))
    with bn.paused(model):
        with pytest.raises(ValueError, match="expected 4D"), bn.paused(model):
            model(X[0])
        model(X)
        assert model[0].num_batches_tracked == model[1].num_batches_tracked == 0
    model(X)
    assert model[0].num_batches_tracked == model[1].num_batches_tracked == 1


def test_a_bad_batch_is_none_of_the_layer_s():
    layer = bn.BatchNorm2d(3)
    with bn.paused(layer):
        layer(torch.full_like(X, torch.nan))
    assert layer.num_batches_skipped == 0


def test_in_a_domain_that_nothing_has_entered():
    layer = bn.BatchNorm2d(3)
    with bn.paused(layer), bn.domain("night"):
        layer(X)
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(3).state_dict())


MUTATIONS = [
    Mutation(
        "paused layers follow", "layers.py",
        "if by_batch and self.follows and holder", "if by_batch and holder",
        "an adversarial batch enters the statistics",
    ),
    Mutation(
        "somebody's layer follows", "passes/paused.py",
        "                buffer.copy_(value)\n", "                pass\n",
        "its forward asks for no setting",
    ),
]  # fmt: skip
