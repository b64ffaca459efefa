"""Arguments, types and attributes that a traced forward did not foresee."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from tests.passes.blocks import Block, X, fuses, keeps, outcome
from tests.passes.compare import beside, near, same, upgraded


class Optional(Block):
    def forward(self, x, scale=None, *, shift=0.0):
        out = torch.tanh(self.norm(self.conv(x)))
        if scale is not None:
            out = out * scale
        return out + shift


@pytest.mark.parametrize(
    ("args", "kwargs", "fused"),
    [
        ((X,), {}, True),
        ((), {"x": X}, True),
        ((X, None), {}, True),
        ((X, X), {}, False),
        ((X,), {"scale": X}, False),
        ((X,), {"shift": 2.0}, False),
    ],
)
def test_a_call_that_was_not_foreseen_runs_the_old_forward(args, kwargs, fused):
    theirs, ours, report = beside(Optional().double())
    assert outcome(report) == ("fused", "tanh")
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    for _ in range(2):
        near(ours(*args, **kwargs), theirs(*args, **kwargs))
        assert (ours.norm.activation == "tanh") == fused
    same(ours, theirs, X)


def test_arguments_that_all_callers_give_are_traced():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Optional()

        def forward(self, x):
            return self.block(x, scale=x)

    model, report = upgraded(Parent(), X)
    assert outcome(report, "block.norm") == ("fused", "tanh") and model.block.norm.activation == "tanh"


def test_a_wrong_call_is_the_error_it_was():
    for args, kwargs in (((), {}), ((X,), {"nothing": 1}), ((X,), {"x": X}), ((X, X, X), {})):
        model, _ = bn.upgrade(Optional())
        with pytest.raises(TypeError, match="argument"):
            model(*args, **kwargs)


@pytest.mark.parametrize("ask", [lambda x: isinstance(x, torch.Tensor), torch.is_tensor])
def test_a_forward_that_asks_for_the_type_of_its_input_is_answered(ask):
    def forward(self, x):
        x = x if ask(x) else torch.cat(x)
        return self.act(self.norm(x))

    model = fuses(forward)
    theirs = copy.deepcopy(model)
    near(model.eval()([X, X]), theirs.eval()(torch.cat([X, X])))
    assert model.norm.activation is None  # it was not traced for that


def test_a_forward_that_asks_for_the_type_of_another_value_is_not_traced():
    keeps(
        lambda self, x: self.act(self.norm(x)) if isinstance(self.conv(x), torch.Tensor) else x,
        "depends on the type",
    )


@pytest.mark.parametrize("change", ["attribute", "child", "layer", "activation"])
def test_what_a_forward_has_read_may_change_afterwards(change):
    class Model(Block):
        def __init__(self):
            super().__init__()
            self.times = 2

        def forward(self, x):
            out = F.silu(self.norm(self.conv(x))) * self.times
            return out if self.shortcut is None else out + self.shortcut(x)

    theirs, ours, report = beside(Model().double())
    assert outcome(report) == ("fused", "silu")
    same(ours, theirs, X)
    for model in (ours, theirs):
        if change == "attribute":
            model.times = 3
        elif change == "child":
            model.shortcut = None
        elif change == "layer":
            model.norm = nn.SyncBatchNorm.convert_sync_batchnorm(model.norm).eval()
        else:
            model.norm.activation = None
        model.eval()
    near(ours(X), theirs(X))
    assert type(ours) is Model
