"""What is fused in a module's own forward, and what is not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.passes.blocks import Block, X, fuses, keeps, outcome
from tests.passes.compare import beside, upgraded

ACTIVATIONS = {
    "relu": [F.relu, torch.relu, lambda x: F.relu(x, inplace=True), lambda x: x.relu(), lambda x: x.relu_()],
    "relu6": [F.relu6, lambda x: F.relu6(x, True), lambda x: F.hardtanh(x, 0.0, 6.0)],
    "leaky_relu": [F.leaky_relu, lambda x: F.leaky_relu(x, 0.01, True)],
    "silu": [F.silu, lambda x: F.silu(x, inplace=True)],
    "sigmoid": [F.sigmoid, torch.sigmoid, lambda x: x.sigmoid()],
    "tanh": [F.tanh, torch.tanh, lambda x: x.tanh_()],
}


@pytest.mark.parametrize(
    ("what", "function"), [(name, each) for name, functions in ACTIVATIONS.items() for each in functions]
)
def test_an_activation_as_a_function_is_fused(what, function):
    fuses(lambda self, x: function(self.norm(self.conv(x))), what)
    fuses(lambda self, x: function(x + self.norm(self.conv(x))), f"residual, {what}")


def test_a_leaky_relu_of_another_slope_keeps_it():
    fuses(lambda self, x: F.leaky_relu(self.norm(x), negative_slope=0.3), "LeakyReLU(negative_slope=0.3)")


def test_a_hardtanh_of_other_bounds_is_not_fused():
    keeps(lambda self, x: F.hardtanh(self.norm(x), -0.5, 6.0), "hardtanh has no fused kernel")


def add_in_place(self, x):
    out = self.norm(self.conv(x))
    out += x
    return self.act(out)


def add_by_method(self, x):
    out = self.norm(self.conv(x))
    out.add_(x)
    out.relu_()
    return out


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.act(self.norm(self.conv(x)) + x),
        lambda self, x: self.act(x + self.norm(self.conv(x))),
        lambda self, x: self.act(torch.add(self.norm(self.conv(x)), self.shortcut(x))),
        lambda self, x: self.act(self.shortcut(x).add(self.norm(self.conv(x)))),
        lambda self, x: self.act(torch.add(self.norm(self.conv(x)), x, alpha=1)),
        add_in_place,
        add_by_method,
    ],
)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True)], ids=str)
def test_a_residual_is_fused(forward, act):
    model = fuses(forward, "residual, relu", act=act)
    names = [node.target for node in torch.fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    assert "act" not in names and names.count("norm") == 1


def grown(self, x):
    kept = self.norm(self.conv(x))
    out = F.relu(kept, inplace=True)
    return out + kept


def changed_and_read(self, x):
    out = self.norm(self.conv(x))
    early = out * 2
    out.relu_()
    return out + early


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda self, x: self.norm(self.conv(x)), "no activation follows"),
        (lambda self, x: self.act(self.norm(x)) + F.relu(self.norm(x)), "is called from 2 places"),
        (lambda self, x: (y := self.norm(x)) + self.act(y), "its output is used 2 times"),
        (lambda self, x: (y := self.norm(x), self.act(y))[::-1], "its output is used 2 times"),
        (lambda self, x: self.act((y := self.norm(x)) + y), "no activation follows, but add"),
        (lambda self, x: self.act(torch.add(self.norm(x), x, alpha=2)), "no activation follows, but add"),
        (lambda self, x: self.act(torch.add(x, self.norm(x), alpha=0.5)), "no activation follows, but add"),
        (lambda self, x: self.act(self.norm(x) + 1), "no activation follows, but add"),
        (lambda self, x: self.act(self.norm(x) + x + x), "no activation follows, but add"),
        (lambda self, x: self.act(self.norm(x) - x), "no activation follows, but sub"),
        (lambda self, x: F.gelu(self.norm(x)), "gelu has no fused kernel"),
        (lambda self, x: self.norm(input=x).relu(), "is not called with its input alone"),
        (grown, "its output is used 2 times"),
        (changed_and_read, "its output is used 2 times"),
        (lambda self, x: self.act(self.norm(x)) if x.sum() > 0 else x, "depends on values"),
    ],
)
def test_in_a_forward_what_is_not_the_pattern_is_not_fused(forward, why):
    keeps(forward, why)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 3, 6, 6), torch.float64),
        ((3, 1, 1), torch.float64),
        ((1,), torch.float64),
        ((4, 3, 6, 6), torch.float32),
        ((2, 4, 3, 6, 6), torch.float64),
    ],
)
def test_a_residual_of_another_shape_or_dtype_gives_what_it_gave(shape, dtype):
    class Two(Block):
        def forward(self, x, r):  # type: ignore[override]
            return torch.tanh(self.norm(self.conv(x)) + r)

    _, report = upgraded(Two(), X, torch.randn(shape, dtype=dtype))
    assert outcome(report) == ("fused", "residual, tanh")


def test_a_residual_that_is_wider_widens_the_output():
    class Two(Block):
        def forward(self, x, r):  # type: ignore[override]
            return F.relu(r + self.norm(x))

    theirs, ours, _ = beside(Two())
    x, r = torch.randn(2, 4, 3, 2, 2).float()[0], torch.randn(4, 3, 2, 2).double()
    assert ours(x, r).dtype == theirs(x, r).dtype == torch.float64
    assert isinstance(ours(x, 2.0), torch.Tensor)


def test_what_training_decides_is_decided_at_each_call():
    def forward(self, x):
        out = self.norm(self.conv(x))
        return F.dropout(self.act(out), 0.5, self.training) if self.training else self.act(out) * 3

    fuses(forward)
    keeps(
        lambda self, x: self.act(self.norm(x)) if self.training else torch.tanh(self.norm(x)),
        "differs between",
    )
    keeps(lambda self, x: self.act(self.norm(x)) if self.training else self.norm(x), "no activation follows")


def test_dropout_draws_the_same_numbers():
    fuses(lambda self, x: F.dropout(self.act(self.norm(F.dropout(x)) + F.dropout(x)), 0.3), "residual, relu")
