"""Subclasses of ours: one with a forward of its own may do anything, and no pass takes it for ours."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.testing import assert_close

import batchnorm as bn
from tests.mutations.mutation import Mutation
from tests.passes.blocks import outcome

X = torch.randn(8, 3, 5, 5) * 3 + 2


class Shifted(bn.BatchNorm2d):
    def forward(self, *arguments):
        return super().forward(*arguments) + 1


class ByTorch(bn.BatchNorm2d):
    def forward(self, x):  # type: ignore[override]
        parameters = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *parameters, self.training, self.momentum or 0.0, self.eps)


class Preset(bn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, eps=1e-3)


each_own = pytest.mark.parametrize("kind", [Shifted, ByTorch])


def model_of(kind):
    return nn.Sequential(nn.Conv2d(3, 3, 1), kind(3), nn.ReLU())


@each_own
@pytest.mark.parametrize("fuse", [True, False])
def test_upgrade_leaves_it_alone_and_says_so(kind, fuse):
    theirs = model_of(kind)
    ours, report = bn.upgrade(copy.deepcopy(theirs), fuse=fuse)
    assert outcome(report, "1") == (
        "left alone", f"is {kind.__name__} of {__name__}, which has a forward of its own",
    )  # fmt: skip
    assert_close(ours(X), theirs(X))


@each_own
@pytest.mark.parametrize("run", [bn.freeze, bn.convert_sync], ids=lambda run: run.__name__)
def test_a_pass_that_cannot_do_without_ours_refuses_it_by_name(run, kind):
    with pytest.raises(ValueError, match=rf"1 is {kind.__name__} of .*, which has a forward of its own"):
        run(model_of(kind))


@each_own
def test_a_virtual_batch_refuses_it_by_name(kind):
    model = model_of(kind)
    with (
        pytest.raises(ValueError, match=r"^1: layers of torch's, and those with a forward of their own"),
        bn.virtual_batch(model, X.split(4)),
    ):
        pass


@each_own
def test_adapt_gives_it_the_statistics_of_its_inputs(kind):
    model = model_of(kind)
    before = copy.deepcopy(model.state_dict())
    inputs = model[0](X)
    adaptation = bn.adapt(model, X.split(4))
    assert_close(model[1].running_mean, inputs.mean((0, 2, 3)))
    assert_close(model[1].running_var, inputs.var((0, 2, 3)))
    assert model[1].num_batches_tracked == 0  # not moved on the way by a forward that asks nobody
    adaptation.reset()
    assert_close(model.state_dict(), before, rtol=0, atol=0)


@each_own
@pytest.mark.parametrize("training", [True, False])
def test_torch_fx_traces_its_forward_once(kind, training):
    model = model_of(kind).train(training)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    assert_close(traced(X), model(X))
    expected = model.state_dict()
    assert_close(traced.state_dict(), {name: expected[name] for name in traced.state_dict()})


def test_one_that_only_chooses_arguments_is_ours():
    theirs = model_of(Preset)
    ours, report = bn.upgrade(copy.deepcopy(theirs))
    assert outcome(report, "1") == ("fused", "relu")
    assert_close(ours(X), theirs(X))
    for run in (bn.freeze, bn.convert_sync):
        run(ours)


MUTATIONS = [
    Mutation(
        "every subclass is ours", "graph/modules.py",
        "isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward",
        "isinstance(module, _BatchNorm)",
        "an activation fused into a forward that knows of none",
    ),
    Mutation(
        "a call of itself within its own forward", "layers.py",
        "if type(self).forward is _BatchNorm.forward:", "if True:",
        "torch.fx doubles what a subclass adds",
    ),
    Mutation(
        "adapt lets buffers move", "calibrate/collecting.py",
        "in buffers:\n                buffer.copy_(value)", "in buffers:\n                pass",
        "a forward that asks nobody moves them while samples pass through",
    ),
]  # fmt: skip
